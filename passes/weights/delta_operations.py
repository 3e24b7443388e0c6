"""Operations of recipes that change weights by what an adapter (LoRA and its kin) adds; all of them in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from passes.weights.recipe import Array, Recipe
from passes.weights.rounding import scratch
from passes.weights.sources import np_dtype
from passes.weights.step import Evaluate, Shape, Step

_SINGLE = 1 << 18
"""Products of a matrix multiplication up to which OpenBLAS stays in the caller's thread (its interface/gemm.c)."""
_TILE_ROWS = 32


def _array(data: Mapping[str, Any], evaluate: Evaluate) -> Array:
    return evaluate(Recipe.from_json(data)).astype(np.float32)


def _add_products(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    """x + sum of scale * left @ right. The factors are joined along their rank: one product, however many adapters.

    With the type "to", the sum is rounded to it at once, so that its float32 stays in memory that is used again.
    """
    lefts = [_array(data, evaluate).reshape(shape[0], -1) for data in args["left"]]
    rights = [
        _array(data, evaluate).reshape(left.shape[1], -1) * np.float32(scale)
        for data, left, scale in zip(args["right"], lefts, args["scale"], strict=True)
    ]
    left, right = np.concatenate(lefts, axis=1), np.concatenate(rights)
    rounded = np_dtype(args["to"]) if "to" in args else None

    def run(x: Array, rows: slice) -> Array:
        size = (x.shape[0], right.shape[1])
        total = np.empty(size, np.float32) if rounded is None else scratch("sum", size, np.float32)
        _multiply_into(total, left[rows], right)
        np.add(total, x.reshape(size), out=total)
        return (total if rounded is None else total.astype(rounded)).reshape(x.shape)

    return Step(run, shape)


def _multiply_into(out: Array, left: Array, right: Array) -> None:
    """out = left [N, r] @ right [r, K], as products so small that BLAS takes one thread for each.

    The pieces of a weight run in threads of ours. OpenBLAS would cut each product up for threads of its own, which all
    callers share: measured with two of each, 3 to 4 times the CPU time.
    """
    (count, rank), columns = left.shape, right.shape[1]
    rows = _divisor(count, _TILE_ROWS)
    width = _divisor(columns, _SINGLE // max(1, rows * rank))
    if width < _TILE_ROWS:  # a size without divisors
        np.matmul(left, right, out=out)
        return
    tiles = out.reshape(count // rows, rows, columns // width, width).transpose(0, 2, 1, 3)
    rights = right.reshape(rank, columns // width, width).transpose(1, 0, 2)
    np.matmul(left.reshape(count // rows, 1, rows, rank), rights, out=tiles)


def _divisor(size: int, most: int) -> int:
    """The largest number up to `most` that divides `size`; 1 when there is none."""
    return next((n for n in range(min(size, most), 1, -1) if size % n == 0), 1)


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
