"""How much each quantized layer loses: its noise on the inputs that it has while a pipeline paints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffc.quantize.convert import enabled_quantizers, layer_of, role_of


@dataclass
class LayerNoise:
    """Sums of squares over all calls of one layer: of its unquantized outputs, and of what quantizing changes."""

    signal: float = 0.0
    noise: float = 0.0

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio in dB: infinite for no noise, -infinite for noise without a signal."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def quantized_layers(backbone: nn.Module) -> list[str]:
    """Module paths of the layers of `backbone` whose weights ModelOpt's quantizers round, in module order."""
    names = [name for name in enabled_quantizers(backbone) if role_of(name) == "weight_quantizer"]
    return list(dict.fromkeys(map(layer_of, names)))


@contextmanager
def measured(
    backbone: nn.Module, quantized: nn.Module, paths: Sequence[str]
) -> Iterator[dict[str, LayerNoise]]:
    """While open, each call of a layer of `backbone` also runs that of `quantized`, on the very same input.

    Each layer is measured by itself: the rounding of other layers does not change its input. The outputs of `backbone`
    do not change. Yields the sums by path, in the order of `paths`; they grow with every call.
    """
    sums = {path: LayerNoise() for path in paths}
    hooks = [
        backbone.get_submodule(path).register_forward_hook(
            _watch(quantized.get_submodule(path), sums[path]), with_kwargs=True
        )
        for path in paths
    ]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _watch(layer: nn.Module, sums: LayerNoise) -> Any:
    @torch.no_grad()
    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        error = layer(*args, **kwargs).double() - output.double()
        sums.noise += float(error.square().sum())
        sums.signal += float(output.double().square().sum())

    return watch
