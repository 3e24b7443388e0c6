"""Low-rank additions to quantized weights: W + up down, added before the weight is rounded.

So the sum is merged into the weight in the end and nothing is left of it at run time (EfficientDM, He et al. 2023,
section 3.1). The layer's weight is replaced for the time of each call of the layer, so that a call that gradient
checkpointing repeats computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "low_rank"


class LowRank(nn.Module):
    """The factors of one addition: up [out, rank], zeros at first, and down [rank, in]; in float32."""

    def __init__(self, outputs: int, inputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(outputs, rank))

    def addition(self, weight: Tensor) -> Tensor:
        """up down in the shape and type of `weight`."""
        return (self.up @ self.down).reshape(weight.shape).to(weight.dtype)


def add_low_rank(model: nn.Module, layers: Sequence[str], rank: int, seed: int) -> None:
    """Give each of the layers at these paths an addition that learns; everything else of `model` stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    for path in layers:
        layer = model.get_submodule(path)
        weight = layer._parameters["weight"]
        assert weight is not None
        flat = weight.flatten(1).shape
        layer.add_module(NAME, LowRank(flat[0], flat[1], min(rank, *flat), generator).to(weight.device))
        layer.register_forward_pre_hook(_add)
        layer.register_forward_hook(_take_away, always_call=True)


def merge_low_rank(model: nn.Module) -> None:
    """Add every addition to its weight, and remove it."""
    with torch.no_grad():
        for layer in list(model.modules()):
            addition = layer._modules.pop(NAME, None)
            weight: Any = layer._parameters.get("weight")
            if isinstance(addition, LowRank):
                weight.add_(addition.addition(weight))


def _add(layer: Any, _: Any) -> None:
    if NAME not in layer._modules:  # merged
        return
    weight = layer._parameters["weight"]
    layer.__dict__["_weight_alone"] = weight
    layer._parameters["weight"] = weight + layer._modules[NAME].addition(weight)


def _take_away(layer: Any, *_: Any) -> None:
    if "_weight_alone" in layer.__dict__:
        layer._parameters["weight"] = layer.__dict__.pop("_weight_alone")
