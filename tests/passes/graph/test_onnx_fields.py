"""Fields of an .onnx file that cannot be: each is one error, before anything allocates by it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from passes.base import PassError
from passes.graph.onnx_fields import check_fields
from passes.storage import load

INFO = helper.make_tensor_value_info


def model(*nodes: onnx.NodeProto) -> ModelProto:
    """y = x W, after `nodes`."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "W")
    x, y = INFO("x", TensorProto.FLOAT, ["n", 8]), INFO("y", TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(
        [*nodes, helper.make_node("MatMul", ["x", "W"], ["y"], "m")], "g", [x], [y], [weight]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def weight(made: ModelProto) -> TensorProto:
    return made.graph.initializer[0]


def external(key: str, value: str) -> Callable[[ModelProto], None]:
    def harm(made: ModelProto) -> None:
        weight(made).ClearField("raw_data")
        weight(made).data_location = TensorProto.EXTERNAL
        for k, v in ({"location": "w"} | {key: value}).items():
            weight(made).external_data.add(key=k, value=v)

    return harm


def bomb(made: ModelProto) -> None:
    """40 functions, each of which calls the next twice: 2^40 nodes."""
    for i in range(40):
        body = [helper.make_node(f"f{i + 1}", [a], [b], domain="own") for a, b in (("a", "b"), ("b", "c"))]
        if i == 39:
            body = [helper.make_node("Abs", ["a"], ["b"]), helper.make_node("Abs", ["b"], ["c"])]
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
        made.functions.append(helper.make_function("own", f"f{i}", ["a"], ["c"], body, imports))


def circle(made: ModelProto) -> None:
    for i in range(2):
        body = [helper.make_node(f"f{1 - i}", ["a"], ["b"], domain="own")]
        made.functions.append(
            helper.make_function("own", f"f{i}", ["a"], ["b"], body, [helper.make_opsetid("own", 1)])
        )


def node(op: str, **attributes: object) -> Callable[[ModelProto], None]:
    return lambda m: m.graph.node.append(helper.make_node(op, ["x"], ["z"], "z", **attributes))


def typed(made: ModelProto) -> None:
    made.graph.input[0].type.tensor_type.elem_type = 99


HARM: dict[str, Callable[[ModelProto], object]] = {
    "longer dims": lambda m: weight(m).dims.append(2),
    "shorter dims": lambda m: weight(m).dims.pop(),
    "negative dims": lambda m: weight(m).dims.__setitem__(0, -8),
    "a thousand dims": lambda m: weight(m).dims.extend([1] * 1000),
    "huge dims": lambda m: weight(m).dims.extend([1 << 61, 1 << 61]),
    "no type": lambda m: setattr(weight(m), "data_type", 0),
    "type 99": lambda m: setattr(weight(m), "data_type", 99),
    "other type": lambda m: setattr(weight(m), "data_type", TensorProto.INT8),
    "doubled weight": lambda m: m.graph.initializer.append(weight(m)),
    "segment": lambda m: setattr(weight(m).segment, "begin", 4),
    "negative offset": external("offset", "-4"),
    "offset in words": external("offset", "zero"),
    "offset of nothing": external("offset", ""),
    "broken offset": external("offset", "1.5"),
    "length in words": external("length", "many"),
    "place with NUL": external("location", "a\0b"),
    "long place": external("location", "a" * 5000),
    "two opsets": lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 20)),
    "opset -1": lambda m: setattr(m.opset_import[0], "version", -1),
    "a bomb of functions": bomb,
    "a circle of functions": circle,
    "no operator": lambda m: setattr(m.graph.node[0], "op_type", ""),
    "no output": lambda m: m.graph.node[0].ClearField("output"),
    "long name": lambda m: setattr(m.graph.node[0], "name", "n" * 5000),
    "attribute twice": lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2),
    "input of type 99": typed,
    "input without a type": lambda m: m.graph.input[0].ClearField("type"),
    "huge input": lambda m: m.graph.input.append(INFO("big", TensorProto.FLOAT, [1 << 40])),
    "negative input": lambda m: m.graph.input.append(INFO("big", TensorProto.FLOAT, [-3])),
    "equation without an end": node("Einsum", equation="......"),
    "equation of nothing known": node("Einsum", equation="i%j->k"),
    "equation of two arrows": node("Einsum", equation="i->j->k"),
    "parts that are not there": node("Split", num_outputs=1 << 33),
    "attribute of nothing": lambda m: m.graph.node[0].attribute.add(
        name="a", type=onnx.AttributeProto.TENSOR
    ),
    "sparse weight": lambda m: m.graph.sparse_initializer.add(dims=[1 << 40]),
}


@pytest.mark.parametrize("name", HARM)
def test_a_field_that_cannot_be(name: str, tmp_path: Path) -> None:
    made = model()
    HARM[name](made)
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    started = time.process_time()
    with pytest.raises(PassError, match="Fix: "):
        load(tmp_path / "m.onnx")
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", [b"MatMul", b"W", b"g", b"n"])
def test_text_that_is_not_utf8(text: bytes, tmp_path: Path) -> None:
    data = model().SerializeToString()
    bad = data.replace(bytes([len(text)]) + text, bytes([len(text)]) + b"\xff" * len(text), 1)
    assert bad != data
    (tmp_path / "m.onnx").write_bytes(bad)
    with pytest.raises(PassError, match="not text in UTF-8"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "equation", ["bhqd,bhkd->bhqk", "...ij, ...jk -> ...ik", "ii", "i,j", "->", "bij->b...ij"]
)
def test_equations_of_einsum(equation: str) -> None:
    check_fields(model(helper.make_node("Einsum", ["x"], ["z"], "z", equation=equation)), "m")


@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.FLOAT8E4M3FN]
)
def test_values_in_fields_of_their_type(dtype: int) -> None:
    made = model()
    values = np.random.default_rng(1).integers(-3, 4, 15).tolist()
    made.graph.initializer.append(helper.make_tensor("V", dtype, [3, 5], values))
    check_fields(made, "m")
    made.graph.initializer[-1].dims[0] = 9
    with pytest.raises(PassError, match=r"weight 'V' \[9, 5\] has"):
        check_fields(made, "m")
