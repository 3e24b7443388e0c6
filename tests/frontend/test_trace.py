"""The trace: sizes that no constant can be taken for, symbols for what is dynamic, recipes for every weight."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import onnx
import pytest
import torch

from diffc.frontend.trace import IR_VERSION, OPSET, _symbol, quiet_exporter, trace_seconds, trace_shape
from diffc.models.registry import FAMILIES
from diffc.models.sources.locate import locate
from diffc.models.spec import DimSpec
from passes.weights.recipe import Recipe

MODELS = ("tiny-sd3", "tiny-sd35", "tiny-flux", "tiny-sdxl")


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_a_trace_differ_from_each_other_and_from_one(name: str) -> None:
    source = locate(name)
    shape = trace_shape(source.family, source.config)
    sizes = [shape.batch, shape.height, shape.width, shape.text]
    assert len(set(sizes)) == 4
    assert min(sizes) > 1
    for dim, size in zip(source.family.dims(source.config), sizes, strict=False):
        assert size % dim.multiple == 0
        assert dim.maximum is None or size <= dim.maximum


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize(
    ("dim", "fits", "too_large"), [(DimSpec("width", 8, 64), 48, 72), (DimSpec("width", 1, 5), 5, 6)]
)
def test_a_symbol_goes_up_to_its_maximum(dim: DimSpec, fits: int, too_large: int) -> None:
    """As torch.export holds it: the exported program runs at a size that fits and refuses a larger one."""
    program = torch.export.export(
        Scaled(), (torch.zeros(16 if dim.multiple > 1 else 3),), dynamic_shapes=[{0: _symbol(dim)}]
    )
    assert program.module()(torch.ones(fits)).tolist() == [2] * fits
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.ones(too_large))


def _fail_inside(logger: logging.Logger) -> None:
    with quiet_exporter():
        warnings.warn("nothing to act on", stacklevel=1)
        raise ValueError(logging.getLevelName(logger.level))


def test_the_exporter_is_quiet_for_as_long_as_it_is_asked() -> None:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="ERROR"):
            _fail_inside(logger)
        assert not told
        warnings.warn("said", stacklevel=1)
    assert logger.level == level
    assert [str(item.message) for item in told] == ["said"]


def test_a_deeper_model_is_not_expected_to_take_longer() -> None:
    """Equal blocks are traced a few times, however many there are."""
    source = locate("tiny-sd3")
    deeper: Any = type("Source", (), {"weights": {**source.weights}})
    for name in source.weights:
        deeper.weights |= {name.replace(".0.", f".{number}."): None for number in range(1, 30)}
    assert len(deeper.weights) > 5 * len(source.weights)
    assert trace_seconds(deeper) == trace_seconds(source) > 6


def test_a_trace_has_names_symbols_and_recipes(traced: onnx.ModelProto) -> None:
    source = locate("tiny-sd3")
    family, graph = source.family, traced.graph
    assert (traced.opset_import[0].version, traced.ir_version, traced.producer_name) == (
        OPSET,
        IR_VERSION,
        "diffc",
    )
    assert [value.name for value in graph.input] == [item.name for item in family.inputs(source.config)]
    assert [value.name for value in graph.output] == [family.output]
    dims = {
        dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim if dim.dim_param
    }
    assert dims == {dim.name for dim in family.dims(source.config)}
    held = {tensor.name: Recipe.of_tensor(tensor) for tensor in graph.initializer}
    weights = {name: recipe for name, recipe in held.items() if recipe is not None}
    assert set(weights) <= set(source.weights)
    read = {name for name in source.weights if name.endswith(("weight", "bias"))}
    assert read <= set(weights)
    assert all(recipe.shape == source.weights[name].shape for name, recipe in weights.items())
    inline = [tensor for name, tensor in ((t.name, t) for t in graph.initializer) if held[name] is None]
    assert sum(tensor.ByteSize() for tensor in inline) < 10_000
    modules = {node.name.partition("/")[0] for node in graph.node if "/" in node.name}
    assert {"transformer_blocks.0.attn", "pos_embed.proj", "proj_out"} <= modules


def test_every_family_has_a_trace_shape() -> None:
    assert {locate(name).family.name for name in MODELS} <= set(FAMILIES)
