"""The structural check: each fault of wiring and interface is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from passes import Pass
from passes.base import PassCheckError, PassError
from passes.graph.check import all_of, check_structure
from tests.passes.graph_helpers import model


def good() -> ModelProto:
    made = model("g (float[4] x) => (float[4] y) { a = Add(x, w) y = Neg(a) }", {"w": np.ones(4, np.float32)})
    for number, node in enumerate(made.graph.node):
        node.name = f"n{number}"
    return made


@dataclass(frozen=True)
class Plain(Pass):
    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Retypes(Pass):
    name: ClassVar[str] = "retypes"
    changes_types: ClassVar[bool] = True


@dataclass(frozen=True)
class Grows(Pass):
    name: ClassVar[str] = "grows"
    changes_interface: ClassVar[bool] = True


def unnamed(made: ModelProto) -> None:
    made.graph.node[0].name = ""


def twice_named(made: ModelProto) -> None:
    made.graph.node[1].name = "n0"


def reads_nothing(made: ModelProto) -> None:
    made.graph.node[0].input[1] = "gone"


def out_of_order(made: ModelProto) -> None:
    first = made.graph.node.pop(0)
    made.graph.node.append(first)


def produced_twice(made: ModelProto) -> None:
    made.graph.node[1].output[0] = "a"


def no_output(made: ModelProto) -> None:
    made.graph.output[0].name = "z"


def wrong_type(made: ModelProto) -> None:
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(4, np.float16), "w"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (unnamed, "node name '' (Add) is empty or used twice"),
        (twice_named, "node name 'n0' (Neg) is empty or used twice"),
        (reads_nothing, "node 'n0' (Add) reads tensor 'gone', not produced before it"),
        (out_of_order, "node 'n1' (Neg) reads tensor 'a', not produced before it"),
        (produced_twice, "node 'n1' (Neg) produces tensor 'a' a second time"),
        (no_output, "graph output 'z' is produced by no node"),
        (wrong_type, "n0"),
    ],
)
def test_faults_are_named_with_the_pass(damage: Callable[[ModelProto], None], said: str) -> None:
    assert check_structure(None, good(), None) == "structure of 2 nodes"
    made = good()
    damage(made)
    with pytest.raises(PassCheckError) as raised:
        check_structure(None, made, Plain())
    assert "pass 'plain'" in str(raised.value)
    assert said in str(raised.value)
    with pytest.raises(PassError, match="the model is not valid ONNX") as told:
        check_structure(None, made, None)
    assert not isinstance(told.value, PassCheckError), "what came in is wrong: no pass is to blame"


def test_bodies_read_what_is_outside_and_nothing_later() -> None:
    text = """g (float[4] x, bool c) => (float[4] y) {
        a = Neg(x)
        y = If (c) <
            then_branch = t () => (float[4] p) { p = Neg(a) }, else_branch = e () => (float[4] q) { q = Abs(x) }
        >
    }"""
    made = model(text)
    for number, node in enumerate((*made.graph.node, *(a.g.node[0] for a in made.graph.node[1].attribute))):
        node.name = f"n{number}"
    assert check_structure(None, made, None)
    made.graph.node[1].attribute[0].g.node[0].input[0] = "y"
    with pytest.raises(PassError, match="reads tensor 'y', not produced before it"):
        check_structure(None, made, None)


def with_output(made: ModelProto) -> None:
    made.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [4]))


def with_type(made: ModelProto) -> None:
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    wrong_type(made)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [(with_output, Grows()), (with_type, Retypes())],
    ids=["more outputs", "other types"],
)
def test_the_interface_changes_where_the_pass_says_so(
    change: Callable[[ModelProto], None], allowed: Pass
) -> None:
    made = good()
    change(made)
    assert check_structure(good(), made, allowed)
    for step in {Plain(), Retypes(), Grows()} - {allowed}:
        with pytest.raises(PassCheckError, match=f"pass '{step.name}': graph .*puts changed from"):
            check_structure(good(), made, step)
    if change is with_output:  # none may go, even so
        with pytest.raises(PassCheckError, match="graph outputs changed"):
            check_structure(made, good(), allowed)


def test_several_checks_in_order() -> None:
    def first(before: ModelProto | None, after: ModelProto, step: Pass | None) -> str:
        return f"first of {len(after.graph.node)} {before} {step}"

    assert all_of(first, check_structure)(None, good(), None) == "first of 2 None None; structure of 2 nodes"
