"""LoRAs added to weights by torch, in float64: the reference that the recipes of compiled weights are held against."""

from __future__ import annotations

import torch

from diffc.models.sources.source import ModelSource
from diffc.tensors import tensor_of
from passes.weights.lora.changes import Change
from passes.weights.lora.fuse import changes_by_parameter


def fused_tensors(source: ModelSource, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights that the LoRAs of `source` change, by name: W + sum of weight * difference, rounded once to `dtype`.

    The arithmetic is torch's own, in float64; `passes.weights.lora.changes.fused` says the same as a recipe.
    """
    if source.base is None:
        return {}
    changes = changes_by_parameter(source.loras)
    weights = source.base.weights
    return {name: _fused(tensor_of(weights[name]), mine).to(dtype) for name, mine in changes.items()}


def _fused(weight: torch.Tensor, changes: list[Change]) -> torch.Tensor:
    base = weight.double()
    for change in changes:
        if change.whole is not None:
            base = tensor_of(change.whole).double().reshape(base.shape)
    result = base.clone()
    for change in changes:
        if change.whole is None:
            result += change.weight * _difference(base, change)
    return result


def _difference(base: torch.Tensor, change: Change) -> torch.Tensor:
    """What an adapter of strength 1 adds to `base`."""
    if change.left is not None and change.right is not None:
        left, right = (tensor_of(recipe).double() for recipe in (change.left, change.right))
        made = left.reshape(base.shape[0], -1) @ right.reshape(right.shape[0], -1)
    else:
        assert change.dense is not None
        made = tensor_of(change.dense).double()
    made = change.scale * made.reshape(base.shape)
    if change.decomposition is None:
        return made
    changed, axis = base + made, change.decomposition.axis
    along = [-1 if i == axis else 1 for i in range(base.ndim)]
    norms = torch.linalg.vector_norm(changed.movedim(axis, 0).flatten(1), dim=1).reshape(along)
    wanted = tensor_of(change.decomposition.magnitude).double().reshape(along)
    decomposed: torch.Tensor = changed * (wanted / norms) - base
    return decomposed
