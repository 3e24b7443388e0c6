"""Operations of recipes that change weights by what an adapter (LoRA and its kin) adds; all of them in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from passes.weights.recipe import Array, Recipe
from passes.weights.step import Evaluate, Shape, Step


def _array(data: Mapping[str, Any], evaluate: Evaluate) -> Array:
    return evaluate(Recipe.from_json(data)).astype(np.float32)


def _add_products(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    """x + sum of scale * left @ right. The factors are joined along their rank: one product, however many adapters."""
    lefts = [_array(data, evaluate).reshape(shape[0], -1) for data in args["left"]]
    rights = [
        _array(data, evaluate).reshape(left.shape[1], -1) * np.float32(scale)
        for data, left, scale in zip(args["right"], lefts, args["scale"], strict=True)
    ]
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)

    def run(x: Array, rows: slice) -> Array:
        total: Array = left[rows] @ right
        total += x.reshape(total.shape)
        return total.reshape(x.shape)

    return Step(run, shape)


def _add(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    other, scale = _array(args["other"], evaluate).reshape(shape), np.float32(args["scale"])
    return Step(lambda x, rows: x + scale * (other[rows] if shape else other), shape)


def _product(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    right = _array(args["right"], evaluate)
    return Step(lambda x, _: x.astype(np.float32) @ right, (shape[0], right.shape[1]))


def _kron(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    right = _array(args["right"], evaluate)
    left = (*shape, *(1,) * (right.ndim - len(shape)))
    result = tuple(a * b for a, b in zip(left, right.shape, strict=True))
    return Step(lambda x, _: np.kron(x.astype(np.float32).reshape(left), right), result, by_rows=False)


def _cut_rows(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    first, count = args["first"], args["count"]
    return Step(lambda x, _: x[first : first + count], (count, *shape[1:]), by_rows=False)


def _decompose(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    """Each slice along the axis with the length that `magnitude` says."""
    axis = args["axis"]
    others = tuple(i for i in range(len(shape)) if i != axis)
    along = tuple(shape[axis] if i == axis else 1 for i in range(len(shape)))
    magnitude = _array(args["magnitude"], evaluate).reshape(along)

    def run(x: Array, rows: slice) -> Array:
        length = np.sqrt(np.sum(np.square(x), axis=others, keepdims=True, dtype=np.float32))
        wanted = magnitude[rows] if axis == 0 else magnitude
        factor: Array = wanted / np.maximum(length, np.finfo(np.float32).tiny)
        changed: Array = x * factor
        return changed

    return Step(run, shape, by_rows=axis == 0)


def _spread_kernel(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    """A convolution's core tensor between its factors: result[o, i] = sum over p, q of x[p, q] up[o, p] down[q, i]."""
    up, down = _array(args["up"], evaluate), _array(args["down"], evaluate)
    result = (up.shape[0], down.shape[1], *shape[2:])

    def run(x: Array, _: slice) -> Array:
        core = x.astype(np.float32).reshape(*shape[:2], math.prod(shape[2:]))
        spread: Array = np.einsum("pqk,op,qi->oik", core, up, down, optimize=True)
        return spread.reshape(result)

    return Step(run, result, by_rows=False)


DELTA_BINDERS: dict[str, Callable[[Mapping[str, Any], Shape, Evaluate], Step]] = {
    "add_products": _add_products,
    "add": _add,
    "product": _product,
    "kron": _kron,
    "cut_rows": _cut_rows,
    "decompose": _decompose,
    "spread_kernel": _spread_kernel,
}
"""Name of the operation -> what makes its step. `passes.weights.deltas` builds recipes of them."""
