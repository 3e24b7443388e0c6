"""A damaged model is a mismatch; the undamaged one is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from diffc.errors import MismatchError
from diffc.validate.outputs import validate_model
from diffc.validate.reports import ShapeReport, require_match
from diffc.validate.torch_reference import TorchReference, validation_shapes
from passes.storage import load, materialize
from tests.conftest import Cell, Cells

Change = Callable[[onnx.ModelProto], None]


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def scaled(name: str, factor: float) -> Change:
    """Multiplies an initializer."""

    def change(model: onnx.ModelProto) -> None:
        tensor = initializer(model, name)
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array * np.float32(factor)).astype(array.dtype), name))

    return change


def swapped(op_type: str, first: int, second: int) -> Change:
    """Swaps two inputs of the second node of that type."""

    def change(model: onnx.ModelProto) -> None:
        node = [n for n in model.graph.node if n.op_type == op_type][1]
        node.input[first], node.input[second] = node.input[second], node.input[first]

    return change


def scale_of(layer: str, quantizer: str, factor: float) -> Change:
    """Multiplies the scale of a layer's quantizer, for its QuantizeLinear and DequantizeLinear alike."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [n for n in model.graph.node if n.name.startswith(f"{layer}.{quantizer}/")]
        (scale,) = {n.input[1] for n in nodes}
        array = numpy_helper.to_array(initializer(model, scale))
        wrong = numpy_helper.from_array((array * factor).astype(array.dtype), f"{scale}_wrong")
        model.graph.initializer.append(wrong)
        for node in nodes:
            node.input[1] = wrong.name

    return change


_references: dict[Path, TorchReference] = {}


def reference_of(cell: Cell) -> TorchReference:
    """The torch model of a cell, made once: it keeps what it computed."""
    if cell.folder not in _references:
        made = TorchReference(cell.plan.source, cell.plan.dtype, cell.checkpoint)
        _references[cell.folder] = made
    return _references[cell.folder]


def validate(cell: Cell, change: Change | None = None) -> list[ShapeReport]:
    """Validation of the cell's model, at the first shape, after `change`."""
    model = materialize(load(cell.folder / "model.onnx"))
    if change is not None:
        change(model)
    return validate_model(
        model,
        reference_of(cell),
        format=cell.request.format,
        shapes=validation_shapes(cell.plan.source)[:1],
        seed=77,
    )


@pytest.mark.parametrize("format", ["none", "fp8"])
def test_the_undamaged_model_matches_on_other_inputs(format: str, compiled: Cells) -> None:
    require_match(validate(compiled("tiny-sd3", format)))


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("none", scaled("proj_out.weight", 1.01)),
        ("none", scaled("transformer_blocks.1.attn.to_out.0.weight", 1.01)),
        ("none", scaled("transformer_blocks.0.ff.net.2.bias", 0)),
        ("none", scaled("transformer_blocks.2.norm1.linear.bias", 0)),
        ("none", swapped("Attention", 1, 2)),
        ("none", swapped("Sub", 0, 1)),
        ("fp8", scaled("transformer_blocks.0.ff.net.0.proj.bias", 0)),
        ("fp8", swapped("Attention", 0, 1)),
        ("fp8", scale_of("transformer_blocks.1.attn.to_v", "weight_quantizer", 1.01)),
        ("fp8", scale_of("transformer_blocks.2.ff.net.2", "weight_quantizer", 1.01)),
    ],
)
def test_a_damaged_model_is_a_mismatch(format: str, change: Change, compiled: Cells) -> None:
    with pytest.raises(MismatchError, match=r"the compiled model\.onnx differs from torch: output") as raised:
        require_match(validate(compiled("tiny-sd3", format), change))
    assert raised.value.exit_code == 3


def test_an_input_scale_that_cuts_values_off_is_a_mismatch(compiled: Cells) -> None:
    change = scale_of("transformer_blocks.1.ff.net.2", "input_quantizer", 0.25)
    with pytest.raises(MismatchError):
        require_match(validate(compiled("tiny-sd3", "fp8"), change))
