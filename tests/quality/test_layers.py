"""The noise of each layer by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffc.quality.layers import measured, quantized_layers


def test_noise_of_a_layer_is_its_own() -> None:
    """The second layer is exact, though the first one's rounding would change its input."""
    torch.manual_seed(8)
    backbone = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    other = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        other[0].weight.mul_(1.01)
        other[0].bias.mul_(1.01)
    x = torch.randn(3, 5, 16)
    expected = backbone(x)
    with measured(backbone, other, ["0", "2"]) as sums:
        for part in x:
            assert torch.equal(backbone(part), expected[x.eq(part).all(-1).all(-1)][0])
    assert sums["0"].snr == pytest.approx(40, abs=1e-3)  # 20 log10(1 / 0.01)
    assert sums["2"].snr == math.inf
    seen = sums["0"].signal
    backbone(x)
    assert sums["0"].signal == seen  # nothing is watched after the block


def test_layers_are_those_that_a_format_quantizes() -> None:
    from diffc.quantize.convert import insert_quantizers
    from diffc.quantize.formats import FORMATS

    model = nn.ModuleDict({"a": nn.Linear(32, 32), "norm": nn.LayerNorm(32), "kept": nn.Linear(32, 32)})
    assert quantized_layers(model) == []
    insert_quantizers(model, FORMATS["fp8"], "kept")
    assert quantized_layers(model) == ["a"]
