"""What an adapter does to a parameter of the model, and the recipe of the parameter after all adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from passes.weights.deltas import Product, add, add_products, cut_rows, decompose
from passes.weights.lora.spellings import Piece
from passes.weights.recipe import Recipe


@dataclass(frozen=True)
class Decomposition:
    """DoRA: the changed weight gets the norms `magnitude` along `axis`."""

    magnitude: Recipe
    axis: int


@dataclass(frozen=True)
class Change:
    """What one adapter does to one parameter W of the model.

    `left` [N, r, ...] and `right` [r, K, ...]: W + scale * left @ right. `dense`: W + scale * dense. `whole`: in the
    place of W. `weight` is the strength that the user gives; of a `whole` it says only whether it counts. `kind` is
    what the adapter is called in reports.
    """

    parameter: str
    kind: str
    scale: float
    weight: float
    left: Recipe | None = None
    right: Recipe | None = None
    dense: Recipe | None = None
    whole: Recipe | None = None
    decomposition: Decomposition | None = None

    def added(self, recipe: Recipe, weight: float) -> Recipe:
        """`recipe` plus the difference, `weight` times."""
        if self.left is not None and self.right is not None:
            return add_products(recipe, [Product(self.left, self.right, self.scale * weight)])
        return recipe if self.dense is None else add(recipe, self.dense, self.scale * weight)


def fused(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """A parameter after all `changes`, in float32: W + sum of weight * difference, to be rounded once by a cast.

    All differences are of the same W, so their order is of no account; a `whole` one takes the place of W first. For
    a decomposed one (DoRA) the difference is that of the weight with new norms to W.
    """
    for change in changes:
        if change.whole is not None:
            recipe = change.whole.reshape(recipe.shape)
    plain = [change for change in changes if change.decomposition is None]
    products = [_product(change) for change in plain if change.left is not None]
    result = add_products(recipe, products) if products else recipe.cast(TensorProto.FLOAT)
    for change in plain:
        if change.dense is not None:
            result = change.added(result, change.weight)
    for change in changes:
        if change.decomposition is not None:
            whole = change.added(recipe.cast(TensorProto.FLOAT), 1.0)
            whole = decompose(whole, change.decomposition.magnitude, change.decomposition.axis)
            result = add(add(result, whole, change.weight), recipe, -change.weight)
    return result


def _product(change: Change) -> Product:
    assert change.left is not None
    assert change.right is not None
    return Product(change.left, change.right, change.scale * change.weight)


def rows_of(recipe: Recipe, piece: Piece) -> Recipe:
    """The rows of a file's layer that belong to `piece`, in the order of our layer."""
    count = recipe.shape[0] if piece.count is None else piece.count
    if not piece.swapped:
        return cut_rows(recipe, piece.first, count)
    half = count // 2
    second = cut_rows(recipe, piece.first + half, count - half)
    return second.append([cut_rows(recipe, piece.first, half)])


def columns(shape: Sequence[int]) -> int:
    """How many values a row has."""
    return math.prod(shape[1:])
