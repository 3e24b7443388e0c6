"""Quantizers for the time of a trace: the operator's rounding is ModelOpt's, and ModelOpt's forward() comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from diffc.errors import DiffcError
from diffc.frontend.quantizers import describe, quantize_dequantize, traceable
from diffc.quantize.kinds import KINDS
from diffc.quantize.state import portable, settings_of

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
