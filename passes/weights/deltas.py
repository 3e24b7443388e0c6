"""Recipes of sums, products and norms, as adapters (LoRA and its kin) change weights; every one gives float32.

Each function adds one operation of `passes.weights.delta_operations` to a recipe; nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import TensorProto

from passes.base import PassError
from passes.weights.recipe import Op, Recipe, bits_of


@dataclass(frozen=True)
class Product:
    """scale * left @ right: left [N, r, ...], right [r, K, ...], whose trailing axes count as columns."""

    left: Recipe
    right: Recipe
    scale: float


def _then(recipe: Recipe, name: str, args: dict[str, Any], shape: tuple[int, ...]) -> Recipe:
    return replace(
        recipe, ops=(*recipe.ops, Op(name, args)), dtype=int(TensorProto.FLOAT), shape=tuple(shape)
    )


def add_products(recipe: Recipe, products: Sequence[Product]) -> Recipe:
    """`recipe` [N, ...] in float32, plus every product. Raises PassError when one has other rows or columns."""
    columns = math.prod(recipe.shape[1:])
    for item in products:
        rank = item.right.shape[0]
        right = math.prod(item.right.shape) // max(1, rank)
        if (math.prod(item.left.shape), right) != (recipe.shape[0] * rank, columns):
            raise PassError(
                f"factors of shapes {item.left.shape} and {item.right.shape} do not make {recipe.shape}"
            )
    args = {
        "left": [item.left.to_json() for item in products],
        "right": [item.right.to_json() for item in products],
        "scale": [item.scale for item in products],
    }
    return _then(_at_most_float32(recipe), "add_products", args, recipe.shape)


def _at_most_float32(recipe: Recipe) -> Recipe:
    """What a sum may read as it is: 16-bit floats widen exactly while they are added, anything else before."""
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return recipe if recipe.dtype in halves else recipe.cast(TensorProto.FLOAT)


def add(recipe: Recipe, other: Recipe, scale: float) -> Recipe:
    """`recipe` plus scale * `other`, which has as many elements. Raises PassError otherwise."""
    if math.prod(recipe.shape) != math.prod(other.shape):
        raise PassError(f"a weight of shape {recipe.shape} has no sum with one of shape {other.shape}")
    args = {"other": other.to_json(), "scale": scale}
    return _then(recipe.cast(TensorProto.FLOAT), "add", args, recipe.shape)


def product(left: Recipe, right: Recipe) -> Recipe:
    """The matrix product of `left` [N, r] and `right` [r, K]; trailing axes of 1 are left out.

    Raises PassError when their ranks differ.
    """
    rank = math.prod(left.shape[1:])
    if right.shape[0] != rank:
        raise PassError(f"factors of shapes {list(left.shape)} and {list(right.shape)} have no product")
    left = left.reshape((left.shape[0], math.prod(left.shape[1:])))
    flat = right.reshape((rank, math.prod(right.shape[1:])))
    return _then(left, "product", {"right": flat.to_json()}, (left.shape[0], flat.shape[1]))


def kron(left: Recipe, right: Recipe) -> Recipe:
    """The Kronecker product; axes that `left` lacks at its end count as 1."""
    padded = (*left.shape, *(1,) * (len(right.shape) - len(left.shape)))
    shape = tuple(a * b for a, b in zip(padded, right.shape, strict=True))
    return _then(left, "kron", {"right": right.to_json()}, shape)


def spread_kernel(core: Recipe, up: Recipe, down: Recipe) -> Recipe:
    """`core` [p, q, kh, kw] between `up` [N, p] and `down` [q, K]: [N, K, kh, kw] (Tucker decomposition)."""
    args = {"up": _matrix(up).to_json(), "down": _matrix(down).to_json()}
    return _then(core, "spread_kernel", args, (up.shape[0], down.shape[1], *core.shape[2:]))


def _matrix(recipe: Recipe) -> Recipe:
    return recipe.reshape((recipe.shape[0], math.prod(recipe.shape[1:])))


def decompose(recipe: Recipe, magnitude: Recipe, axis: int) -> Recipe:
    """Every slice of `recipe` along `axis` with the L2 norm that `magnitude` says (DoRA, arXiv:2402.09353)."""
    args = {"magnitude": magnitude.to_json(), "axis": axis}
    return _then(recipe.cast(TensorProto.FLOAT), "decompose", args, recipe.shape)


def cut_rows(recipe: Recipe, first: int, count: int) -> Recipe:
    """`count` rows from row `first` on. Of a plain tensor of a file only these rows are read.

    Raises PassError when the rows are not there.
    """
    if not recipe.shape or first < 0 or first + count > recipe.shape[0]:
        raise PassError(f"a weight of shape {recipe.shape} has no rows {first} to {first + count}")
    shape = (count, *recipe.shape[1:])
    if first == 0 and shape == recipe.shape:
        return recipe
    source, bits = recipe.source, math.prod(recipe.shape[1:]) * bits_of(recipe.dtype)
    if not recipe.ops and source.kind == "raw" and bits % 8 == 0:
        begin, length = source.offset + first * bits // 8, count * bits // 8
        return Recipe.of_source(replace(source, shape=shape, offset=begin, length=length))
    cut = Op("cut_rows", {"first": first, "count": count})
    return replace(recipe, ops=(*recipe.ops, cut), shape=shape)
