"""The frontend in small: the quantizer operator, translations, random inputs and names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.errors import DiffcError
from diffc.frontend.quantizers import describe, quantize_dequantize, traceable
from diffc.frontend.translations import translations
from diffc.models.embedded import tiny
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import FAMILIES
from diffc.models.spec import Shape
from diffc.quantize.kinds import KINDS
from diffc.quantize.state import portable, settings_of

CONFIGS: dict[str, dict[str, Any]] = {"sd3": tiny.SD35, "flux": tiny.FLUX, "sdxl": tiny.SDXL}
BITS: dict[str, Any] = {"int8": 8, "fp8": (4, 3)}


def quantizer_of(kind: str, axis: int | None, amax: torch.Tensor) -> Any:
    config = QuantizerAttributeConfig(num_bits=BITS[kind], axis=axis)
    quantizer = TensorQuantizer(config)
    quantizer.amax = amax
    return quantizer


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("axis", [None, 0])
def test_the_operator_rounds_as_modelopt_does(kind: str, axis: int | None) -> None:
    x = torch.randn(48, 96, generator=torch.Generator().manual_seed(6)) * 3
    amax = x.abs().amax() if axis is None else x.abs().amax(1, keepdim=True)
    amax = portable(amax * 0.7, KINDS[kind].bound)  # some values saturate
    ours = quantize_dequantize(
        x, (amax / KINDS[kind].bound).flatten() if axis == 0 else amax / KINDS[kind].bound, kind, axis, 0
    )
    theirs = quantizer_of(kind, axis, amax)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert (ours - x).abs().max() > 0.1  # of those that saturate
    assert len(ours.unique()) < 0.9 * ours.numel()


def test_a_quantizer_without_translation_is_refused() -> None:
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=6, axis=0))
    with pytest.raises(DiffcError, match="a quantizer of 6 bits with blocks None is not of a kind"):
        describe(settings_of(quantizer.get_modelopt_state()), 8, (8, 8))
    blocks = TensorQuantizer(QuantizerAttributeConfig(num_bits=4, block_sizes={-1: 16}))
    with pytest.raises(TypeError, match="blocks of int4 are for weights"):
        describe(settings_of(blocks.get_modelopt_state()), 8, None)


def test_modelopts_forward_comes_back_after_a_trace() -> None:
    before = TensorQuantizer.forward
    with pytest.raises(ZeroDivisionError), traceable({}, {}):  # noqa: PT012  # the error ends the block
        assert TensorQuantizer.forward is not before
        raise ZeroDivisionError
    assert TensorQuantizer.forward is before


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs)


def _unequal(x: torch.Tensor) -> Any:
    a, b, c = x.split([1, 2, 5], dim=1)
    return a * 2 + b.sum(1, keepdim=True) - c[:, :1] * b[:, 1:]


def _chunks(x: torch.Tensor) -> Any:
    first, second = x.chunk(2, dim=-1)
    return first * torch.sigmoid(second)


def _uneven(x: torch.Tensor) -> Any:
    pieces = x.split(3, dim=1)
    return torch.cat([p.sum(1, keepdim=True) for p in pieces], dim=1)


@pytest.mark.parametrize(
    ("function", "kinds", "operators"),
    [
        (_unequal, [torch.float32], {"Slice"}),
        (_chunks, [torch.float32], {"Split"}),
        (_uneven, [torch.float32], {"Slice", "Concat"}),
        (lambda a, b: torch.cat([a, b], dim=1) * 2, [torch.float16, torch.float32], {"Cast", "Concat"}),
        (lambda a, b: torch.concat([a, b], dim=1) * 2, [torch.float16, torch.float32], {"Cast", "Concat"}),
        (lambda a: torch.einsum("nhw->nwh", a.reshape(a.shape[0], 2, 4)), [torch.float32], {"Transpose"}),
        (lambda a, b: torch.einsum("nc,nc->n", a, b), [torch.float32] * 2, {"Einsum"}),
    ],
)
def test_translations_compute_what_torch_does(
    function: Callable[..., Any], kinds: list[torch.dtype], operators: set[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(9)
    inputs = tuple(torch.randn(5, 8, generator=generator).to(kind) for kind in kinds)
    dynamic = tuple({0: torch.export.Dim("n", min=1, max=64)} for _ in inputs)
    program = torch.onnx.export(
        torch.export.export(Call(function), inputs, dynamic_shapes=(dynamic,)),
        dynamo=True,
        opset_version=23,
        optimize=False,
        verbose=False,
        custom_translation_table=translations(),
    )
    program.model.ir_version = 11
    model = program.model_proto
    onnx.save(model, tmp_path / "m.onnx")
    found = {node.op_type for node in model.graph.node}
    assert operators <= found
    assert not found & {"SplitToSequence", "SequenceAt"}
    fed = tuple(torch.randn(7, 8, generator=generator).to(kind) for kind in kinds)
    with OrtSession(tmp_path / "m.onnx") as session:
        names = [value.name for value in model.graph.input]
        result = session.run({n: v.numpy() for n, v in zip(names, fed, strict=True)})
    expected = function(*fed)
    (output,) = result.values()
    assert output.dtype == expected.numpy().dtype
    np.testing.assert_allclose(output, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_random_inputs_are_seeded_plausible_and_of_the_specs_shape(family: str) -> None:
    spec, config, shape = FAMILIES[family], CONFIGS[family], Shape(2, 128, 192, 21)
    values = random_inputs(spec, config, shape, dtype=torch.float16, seed=3)
    again = random_inputs(spec, config, shape, dtype=torch.float16, seed=3)
    other = random_inputs(spec, config, shape, dtype=torch.float16, seed=4)
    assert {n: tuple(v.shape) for n, v in values.items()} == spec.input_shapes(config, shape)
    for item in spec.inputs(config):
        value = values[item.name]
        assert torch.equal(value, again[item.name])
        assert value.dtype == (torch.float16 if item.dtype == "model" else torch.float32)
        assert torch.isfinite(value).all()
        assert value.abs().sum() > 0
        if item.sample != "image_ids":  # positions are no matter of chance
            assert not torch.equal(value, other[item.name])


def test_flux_positions_are_a_grid() -> None:
    spec, config = FAMILIES["flux"], CONFIGS["flux"]
    values = random_inputs(spec, config, Shape(1, 64, 96, 5), dtype=torch.float32, seed=0)
    ids = values["img_ids"]
    assert len(ids.unique(dim=0)) == len(ids) == 4 * 6
    assert ids[:, 1].max() == 3
    assert ids[:, 2].max() == 5


def test_nested_inputs_reach_forward_nested() -> None:
    spec, config = FAMILIES["sdxl"], CONFIGS["sdxl"]
    named = {item.name: item.name for item in spec.inputs(config)}
    kwargs = forward_kwargs(spec, config, named)
    assert kwargs["added_cond_kwargs"] == {"text_embeds": "text_embeds", "time_ids": "time_ids"}
    flat = {k for k in kwargs if k != "added_cond_kwargs"} | set(kwargs["added_cond_kwargs"])
    assert flat == set(named)
