"""The weights of a source as torch tensors, each computed or read from its file when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from diffc.tensors import tensor_of
from passes.weights.recipe import Recipe


class TorchWeights(Mapping[str, torch.Tensor]):
    """The tensors of `weights` by name, in float32; their values are first rounded to `dtype` if one is given.

    Those of `exact` are not rounded.
    """

    def __init__(
        self,
        weights: Mapping[str, Recipe],
        dtype: torch.dtype | None = None,
        exact: frozenset[str] = frozenset(),
    ):
        self._weights, self._dtype, self._exact = weights, dtype, exact

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = tensor_of(self._weights[name], None if name in self._exact else self._dtype)
        return tensor.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def fill_buffers(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give the floating-point buffers of `model` the values of `weights`, or their own, rounded to `dtype`, in float32.

    accelerate loads parameters alone; buffers are small (SD3's position embedding).
    """
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            value = weights.get(name, buffer)
            buffer.copy_(value.to(dtype).float())
