"""How good a quantized backbone is: the signal-to-noise ratio of its answers to calls that are kept for this."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffc.quantize.simulate import cpu_block_quant
from diffc.train.calls import Batch


def answers_snr(
    model: nn.Module,
    calls: Iterable[Batch],
    forward: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    device: Any,
) -> float:
    """10 log10 of the sum of squares of the teacher's answers over that of the differences to them, in dB.

    Infinite for equal answers, -infinite for NaN.
    """
    signal = noise = 0.0
    with torch.no_grad(), cpu_block_quant():
        for call in calls:
            inputs = {name: value.to(device) for name, value in call.inputs.items()}
            target = call.target.to(device).double()
            signal += float(target.square().sum())
            noise += float((forward(model, inputs).double() - target).square().sum())
    if math.isnan(noise):
        return -math.inf
    return 10 * math.log10(signal / noise) if noise else math.inf
