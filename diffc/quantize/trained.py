"""Weights that training has changed: which they are, that they are sound, and how they get into a backbone.

A checkpoint carries them in the quantizer's own domain: the weight of a layer with channel factors or a low-rank branch
as it is after both, so that no scaling is done again. Trained weights sit at the edges between two steps of their
quantizer, and a rounding on the way would move them over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from diffc.errors import DiffcError
from diffc.quantize.state import fake_mode_of
from diffc.tensors import tensor_of
from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import np_dtype

if TYPE_CHECKING:
    from torch import nn

_PIECE = 1 << 22
"""Elements that are compared at a time."""


def changed_weights(theirs: Mapping[str, Recipe], own: Mapping[str, Recipe], name: str) -> dict[str, Recipe]:
    """Those of `theirs` whose values are not exactly those of `own`, and those that `own` lacks.

    A tensor of another type is equal when its values are those of `own` rounded to its type: a model that was cast
    and not trained has none that differ. Both are read piece by piece. Raises DiffcError, which names the tensor in
    `name` (a file), for values that are NaN or infinite.
    """
    changed = {}
    for key, recipe in theirs.items():
        try:
            same = key in own and _equal(recipe, own[key])
        except PassError as error:
            raise DiffcError(
                f"{name}: tensor {key!r} cannot be compared with the model's own: {error}",
                fix="where training has diverged, take a checkpoint from before that, or train with a lower rate",
            ) from error
        if not same:
            changed[key] = recipe
    return changed


def _equal(one: Recipe, other: Recipe) -> bool:
    """Whether the values of `other`, in the type of `one`, are those of `one`. NaN is equal to nothing."""
    if one.shape != other.shape:
        return False
    pairs = zip(_pieces(evaluate(one)), _pieces(evaluate(other.cast(one.dtype))), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def nearly_equal(one: Recipe, other: Recipe) -> bool:
    """Whether two weights differ by no more than the roundings of a multiplication and a sum in the type of `one`.

    An element may be off by two units in the last place of the largest in its tensor that the sum has, which is
    taken to be its row's.
    """
    if one.shape != other.shape:
        return False
    a, b = (evaluate(recipe).astype(np.float32).reshape(one.shape[0], -1) for recipe in (one, other))
    step = float(ml_dtypes.finfo(np_dtype(one.dtype)).eps)
    return bool((np.abs(a - b) <= 2 * step * np.abs(b).max(axis=1, keepdims=True)).all())


def _pieces(array: Array) -> Iterator[Array]:
    flat = array.reshape(-1)
    return (flat[begin : begin + _PIECE] for begin in range(0, flat.size, _PIECE))


def check_weights(backbone: nn.Module, weights: Mapping[str, Recipe]) -> None:
    """Raise DiffcError when the backbone, fake or real, has no tensor of the name and shape of one of `weights`."""
    if not weights:
        return
    state = backbone.state_dict()
    for name, recipe in weights.items():
        here = tuple(state[name].shape) if name in state else None
        if here != recipe.shape:
            raise DiffcError(
                f"the checkpoint carries {name!r} of shape {list(recipe.shape)}, and this {type(backbone).__name__} has"
                f" {'none' if here is None else list(here)}",
                fix="give the checkpoint of this model",
            )


def put_weights(backbone: nn.Module, weights: Mapping[str, Recipe]) -> None:
    """Give the parameters and buffers of `backbone` the values of `weights`, in their own types and on their devices.

    Fake tensors, and those on the meta device, stay as they are.
    """
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    for name, recipe in weights.items():
        tensor = tensors[name]
        if fake_mode_of(tensor) is None and not tensor.is_meta:
            tensor.data = tensor_of(recipe, tensor.dtype).to(tensor.device)
