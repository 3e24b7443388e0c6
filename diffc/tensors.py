"""Recipes and torch tensors: the values of a recipe as a tensor, and a tensor as a recipe."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from passes.weights.evaluate import evaluate
from passes.weights.mapped import MappedFiles
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import keep

if TYPE_CHECKING:
    import torch

# Types that numpy lacks: the integers of the same size, and torch's name for the type.
_BY_BITS = {
    np.dtype(ml_dtypes.bfloat16): (np.int16, "bfloat16"),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, "float8_e4m3fn"),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, "float8_e5m2"),
}


def mapped_tensor(recipe: Recipe, files: MappedFiles | None = None) -> torch.Tensor:
    """The values of a recipe as a tensor of the recipe's type, to be read only: of a plain file, it is mapped.

    With `files` its file stays mapped, for who reads it again and again.
    """
    if files is None or recipe.ops:
        return _shared(evaluate(recipe))
    return _shared(files.read(recipe.source))


def tensor_of(recipe: Recipe, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The values of a recipe as a tensor of its own memory, in `dtype` or the recipe's type."""
    mapped = mapped_tensor(recipe)
    return mapped.clone() if dtype in (None, mapped.dtype) else mapped.to(dtype)


def recipe_of_tensor(tensor: torch.Tensor) -> Recipe:
    """A recipe over the values of a tensor, which stay in this process's memory; its type is kept."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    for dtype, (bits, name) in _BY_BITS.items():
        if tensor.dtype == getattr(torch, name):
            integers = torch.int16 if bits is np.int16 else torch.uint8
            return keep(tensor.view(integers).numpy().view(dtype))
    return keep(tensor.numpy())


def _shared(array: Array) -> torch.Tensor:
    """A tensor over the memory of `array`, which may be a file that is mapped for reading only."""
    import torch

    bits, name = _BY_BITS.get(array.dtype, (None, ""))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The given NumPy array is not writable"
        )  # nobody writes: see tensor_of
        tensor = torch.from_numpy(array if bits is None else array.view(bits))
    return tensor if bits is None else tensor.view(getattr(torch, name))
