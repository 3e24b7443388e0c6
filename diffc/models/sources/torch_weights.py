"""The weights of a source as torch tensors, each computed or read from its file when it is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import torch

from passes.weights.evaluate import evaluate
from passes.weights.recipe import Array, Recipe

# Types that numpy lacks, and torch's name for the same bits.
_BY_BITS = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, torch.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, torch.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, torch.float8_e5m2),
}


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


def tensor_of(recipe: Recipe, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of a recipe as a tensor of its own memory, in `dtype` or the recipe's type."""
    mapped = _shared(evaluate(recipe))
    return mapped.clone() if dtype in (None, mapped.dtype) else mapped.to(dtype)


def _shared(array: Array) -> torch.Tensor:
    """A tensor over the memory of `array`, which may be a file that is mapped for reading only."""
    bits, dtype = _BY_BITS.get(array.dtype, (None, None))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The given NumPy array is not writable"
        )  # nobody writes: see tensor_of
        tensor = torch.from_numpy(array if bits is None else array.view(bits))
    return tensor if dtype is None else tensor.view(dtype)


def fill_buffers(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give the floating-point buffers of `model` the values of `weights`, or their own, rounded to `dtype`, in float32.

    accelerate loads parameters alone; buffers are small (SD3's position embedding).
    """
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            value = weights.get(name, buffer)
            buffer.copy_(value.to(dtype).float())
