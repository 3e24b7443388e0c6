"""`--bisect` names the first module that is wrong, and finds nothing where nothing is."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import pytest

from diffc.commands.validate import Validated
from diffc.errors import MismatchError
from diffc.validate.modules import ModuleReport
from diffc.validate.reports import UNROUNDED
from passes import Pipeline
from passes.presets import target_passes
from passes.storage import materialize
from tests.conftest import Cell, Cells
from tests.validate.damage import Damage, damaged, scaled, validate


@pytest.fixture(scope="module")
def fp8(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def without_approximation(model: onnx.ModelProto) -> None:
    """The feed-forward of block 1 activates with another Gelu: off by 1e-3 at most."""
    (node,) = (n for n in model.graph.node if n.name == "transformer_blocks.1.ff.net.0/Gelu")
    (attribute,) = node.attribute
    assert attribute.s == b"tanh"
    attribute.s = b"none"


def crossed(model: onnx.ModelProto) -> None:
    """Attention of block 1 takes its keys for its queries."""
    nodes = {n.name: n for n in model.graph.node}
    query, key = (nodes[f"transformer_blocks.1.attn.to_{x}/MatMul"] for x in "qk")
    query.input[1], key.input[1] = key.input[1], query.input[1]


def first(result: Validated) -> str:
    """The module that is the first to be off, in the first arithmetic that shows anything."""
    return next(r for r in result.modules["model.onnx"] if r.wrong).wrong[0].value.module


@pytest.mark.parametrize(
    ("damage", "module"),
    [
        (
            scaled("transformer_blocks.1.ff.net.2.weight_quantizer.scale", 1.1),
            "transformer_blocks.1.ff.net.2",
        ),
        pytest.param(
            scaled("transformer_blocks.1.ff.net.2.input_quantizer.scale", 1.1),
            "transformer_blocks.1.ff.net.2.input_quantizer",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            scaled("transformer_blocks.1.attn.to_k.bias", 1.02),
            "transformer_blocks.1.attn.to_k",
            marks=pytest.mark.slow,
        ),
        pytest.param(without_approximation, "transformer_blocks.1.ff.net.0", marks=pytest.mark.slow),
        (crossed, "transformer_blocks.1.attn.to_q"),
    ],
    ids=["weight scale", "activation scale", "bias", "operator", "wires"],
)
def test_bisect_names_the_module_that_was_damaged(
    fp8: Cell, tmp_path: Path, damage: Damage, module: str
) -> None:
    result = validate(damaged(fp8, tmp_path, damage))
    assert first(result) == module
    names = {w.value.module for r in result.modules["model.onnx"] for w in r.wrong}
    assert len(names) <= 2, "what comes behind is fed the right values"
    with pytest.raises(MismatchError, match=re.escape(f"{module} of the compiled model.onnx differs")):
        result.require_match()


def test_findings_say_which_nodes_are_in_the_piece(fp8: Cell, tmp_path: Path) -> None:
    result = validate(damaged(fp8, tmp_path, scaled("transformer_blocks.1.attn.to_k.bias", 1.5)))
    found = result.modules["model.onnx"][0]
    assert isinstance(found, ModuleReport)
    assert found.arithmetic == UNROUNDED
    (wrong,) = found.wrong
    assert wrong.value.op == "Add"
    assert wrong.nodes[-1] == "transformer_blocks.1.attn.to_k/Add"
    assert "transformer_blocks.1.attn.to_k/MatMul" in wrong.nodes
    assert wrong.error > wrong.limit


@pytest.mark.slow
def test_bisect_finds_nothing_in_a_unet_that_was_just_made(compiled: Cells) -> None:
    result = validate(compiled("tiny-sdxl", "fp8").folder)
    reports = result.modules["model.onnx"]
    assert not any(r.wrong for r in reports)
    assert all(r.modules > 50 for r in reports)


def test_bisect_finds_nothing_in_fused_operators(fp8: Cell, tmp_path: Path) -> None:
    """What fusing takes from a module, its bias or norm, is no longer compared with what the module gives."""

    def fused(model: onnx.ModelProto) -> None:
        made = Pipeline(target_passes("ort-cuda")).run(model).model
        model.CopyFrom(materialize(made))  # a file holds values and no recipes
        assert {"FastGelu", "MultiHeadAttention"} <= {node.op_type for node in model.graph.node}

    result = validate(damaged(fp8, tmp_path, fused))
    reports = result.modules["model.onnx"]
    assert not any(r.wrong for r in reports)
    assert all(r.modules > 60 for r in reports)
