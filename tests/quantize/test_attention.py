"""Attention of any class of diffusers gets quantizers in front of scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention
from diffusers.models.transformers.transformer_ovis_image import OvisImageAttention
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Attention, SkyReelsV2AttnProcessor
from torch import nn

from diffc.quantize.attention import (
    attention_as,
    attention_by_default,
    attention_layers,
    disable_unused,
    head_size,
    plain_attention,
)
from diffc.quantize.convert import convert_layers, enabled_quantizers

UNLISTED: dict[str, Any] = {
    "kandinsky": lambda: Kandinsky5Attention(64, 32),
    "ovis": lambda: OvisImageAttention(64, heads=2, dim_head=32),
    "skyreels": lambda: SkyReelsV2Attention(64, 2, 32, processor=SkyReelsV2AttnProcessor()),
}
"""Attention classes that ModelOpt does not know."""


def network(attention: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), attention).eval()


def calibrated(model: nn.Module, x: torch.Tensor) -> None:
    """As a calibration does: every quantizer of attention in FP8, with the amax of one run."""
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg
    from modelopt.torch.quantization.model_calib import enable_stats_collection, finish_stats_collection

    convert_layers(model, attention_layers(model))
    fp8 = {"num_bits": (4, 3), "axis": None}
    set_quantizer_by_cfg(model, [{"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": fp8}])
    enable_stats_collection(model)
    with torch.no_grad(), attention_as(plain_attention):
        model(x)
    finish_stats_collection(model)
    disable_unused(model)


@pytest.mark.parametrize("name", UNLISTED)
def test_a_class_that_modelopt_does_not_list_is_quantized(name: str) -> None:
    torch.manual_seed(5)
    model = network(UNLISTED[name]())
    x = torch.randn(2, 24, 64)
    with torch.no_grad():
        plain = model(x)
    calibrated(model, x)
    assert {q.rpartition(".")[2] for q in enabled_quantizers(model)} == {f"{n}_bmm_quantizer" for n in "qkv"}
    with torch.no_grad(), attention_by_default():
        rounded = model(x)
    error = float((rounded - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.1


def test_linear_attention_is_left_alone() -> None:
    torch.manual_seed(6)
    linear = Attention(64, heads=2, dim_head=32, processor=SanaLinearAttnProcessor2_0(), bias=True)
    model = network(linear)
    assert attention_layers(model) == ["1"]
    calibrated(model, torch.randn(2, 24, 64))
    assert not enabled_quantizers(model)


def test_heads_that_have_no_kernel_are_left_out() -> None:
    model = network(SkyReelsV2Attention(64, heads=2, dim_head=24))
    assert head_size(model[1]) == 24
    assert attention_layers(model) == []


def test_another_attention_counts_over_the_default() -> None:
    torch.manual_seed(7)
    model, x = network(UNLISTED["ovis"]()), torch.randn(1, 8, 64)
    calibrated(model, x)
    seen = []

    def other(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(query.shape)
        return plain_attention(module, query, *args, **kwargs)

    with torch.no_grad(), attention_as(other), attention_by_default():
        model(x)
    assert len(seen) == 1
