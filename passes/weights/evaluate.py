"""Evaluating recipes: whole, or as tasks that each compute some rows, in memory near that of the result.

Rows are computed in pieces that fit the cache, on every core: numpy lets go of Python's lock while it works.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from passes.weights.operations import BOUNDS, bind
from passes.weights.recipe import Array, Op, Recipe, RecipeValues, bits_of
from passes.weights.rounding import all_codes, lookup, scratch
from passes.weights.sources import read
from passes.weights.step import Shape, Step

__all__ = ["BOUNDS", "THREADS", "Task", "evaluate", "tasks", "to_bytes"]

THREADS = min(16, os.cpu_count() or 1)
_PIECE = 1 << 17
"""Elements that pass through all steps before the next: as float32, half a megabyte."""
_TASK = 1 << 22
"""Elements of a task: enough for one thread to work a few milliseconds."""
_TURNED = 1 << 19
"""Elements of a task that transposes: a weight is prepared whole before its first byte is written, so all cores share
even one of 9 million elements."""
_TILE = 32
"""Rows that are transposed at a time: so many columns of the result are written a cache line each."""
_FOUR_BITS = (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4), np.dtype(ml_dtypes.float4_e2m1fn))

Task = Callable[[], Array]


def evaluate(recipe: Recipe) -> Array:
    """The array that a recipe describes. Raises PassError on unknown operations and missing files."""
    array, steps = _prepared(recipe)
    return _whole(array, steps) if steps else array


def tasks(recipe: Recipe) -> Iterator[Task]:
    """Functions that compute the rows of `evaluate(recipe)` one part after another, and may run at the same time.

    Parts are contiguous and hold an even count of elements, the last one excepted. What must be known as a
    whole, such as the input of a transpose, is computed here, before the first task.
    """
    if len(parts := recipe.rows) > 1:
        for part in parts:  # one after another: together they may not fit
            yield from tasks(part)
        return
    array, steps = _prepared(recipe)
    array, shape = _flat(array, steps)
    for rows in _split(_row_size(array, shape), 0, shape[0] if shape else 1, _TASK):
        yield partial(_rows, array, steps, rows)


def _prepared(recipe: Recipe) -> tuple[Array, list[Step]]:
    """An array and the steps from it to the result, each of which works on rows."""
    array, steps = read(recipe.source), list[Step]()
    for op in _joined(recipe.ops):
        step = bind(op, _result_shape(array, steps), evaluate)
        if step.by_rows:
            steps.append(step)
        elif op.name == "transpose" and len(step.shape) == 2 and math.prod(step.shape) > _PIECE:
            array, steps = _transposed(array, _tabled(array, steps)), []
        else:
            array, steps = step.run(_whole(array, _tabled(array, steps)), slice(0, 0)), []
    return array, _tabled(array, steps)


def _joined(ops: Sequence[Op]) -> list[Op]:
    """`ops`, a sum of products and the cast to 16 bits after it as one."""
    joined: list[Op] = []
    for op in ops:
        last = joined[-1] if joined else None
        if last and last.name == "add_products" and op.name == "cast" and bits_of(op.args["to"]) == 16:
            joined[-1] = Op(last.name, {**last.args, **op.args})
        else:
            joined.append(op)
    return joined


def _result_shape(array: Array, steps: list[Step]) -> Shape:
    return steps[-1].shape if steps else array.shape


def _whole(array: Array, steps: list[Step]) -> Array:
    """The result of all steps, computed part by part into one array."""
    if not steps:
        return array
    wanted = _result_shape(array, steps)
    array, shape = _flat(array, steps)
    if array.size <= _PIECE or array.ndim == 0:
        return _run(array, steps, slice(0, shape[0] if shape else 1)).reshape(wanted)
    result = np.empty(shape, _run(array[:1], steps, slice(0, 1)).dtype)

    def fill(rows: slice) -> None:
        for piece in _split(_row_size(array, shape), rows.start, rows.stop, _PIECE):
            result[piece] = _run(array[piece], steps, piece)

    _at_once(fill, _split(_row_size(array, shape), 0, shape[0], _TASK))
    return result.reshape(wanted)


def _transposed(array: Array, steps: list[Step]) -> Array:
    """The transpose of a result [N, K], each piece turned while it is in the cache.

    As integers: numpy copies elements of a type that is not its own one by one, through a function of that type.
    """
    rows, columns = _result_shape(array, steps)
    result = np.empty((columns, rows), _run(array[:1], steps, slice(0, 1)).dtype)
    bits = result.view(f"u{result.itemsize}")

    def fill(part: slice) -> None:
        for piece in _split(1, part.start, part.stop, _TILE):
            bits[:, piece] = np.ascontiguousarray(_run(array[piece], steps, piece)).view(bits.dtype).T

    _at_once(fill, _split(_row_size(array, (rows, columns)), 0, rows, _TURNED))
    return result


def _at_once(work: Callable[[slice], None], parts: Iterator[slice]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, parts))


def _flat(array: Array, steps: list[Step]) -> tuple[Array, Shape]:
    """The same as one row of elements where no step minds, so that it can be cut anywhere; the result's shape."""
    if array.ndim and array.flags.c_contiguous and all(step.by_element for step in steps):
        array = array.reshape(-1)
        return array, array.shape
    return array, _result_shape(array, steps)


def _row_size(array: Array, shape: Shape) -> int:
    """Elements of a row, before or after the steps, whatever is more."""
    return max(1, math.prod(array.shape[1:]), math.prod(shape[1:]))


def _split(row: int, start: int, stop: int, elements: int) -> Iterator[slice]:
    """Rows of `row` elements in slices of about `elements` elements; an even number of rows, the last excepted."""
    size = max(2, elements // row // 2 * 2)
    for begin in range(start, max(stop, start + 1), size):
        yield slice(begin, min(begin + size, stop))


def _rows(array: Array, steps: list[Step], rows: slice) -> Array:
    """The rows `rows` of the result, or all of it where there are no rows."""
    if array.ndim == 0:
        return _run(array, steps, rows)
    pieces = list(_split(_row_size(array, ()), rows.start, rows.stop, _PIECE))
    if not steps or len(pieces) == 1:
        return _run(array[rows], steps, rows)
    first = _run(array[pieces[0]], steps, pieces[0])
    result = np.empty((rows.stop - rows.start, *first.shape[1:]), first.dtype)
    result[: len(first)] = first
    for piece in pieces[1:]:
        result[piece.start - rows.start : piece.stop - rows.start] = _run(array[piece], steps, piece)
    return result


def _run(x: Array, steps: list[Step], rows: slice) -> Array:
    for step in steps:
        x = step.run(x, rows)
    return x


def _tabled(array: Array, steps: list[Step]) -> list[Step]:
    """The steps with a table in place of those that map single 16-bit elements to as few bits.

    Such steps come first, or after a sum that is rounded to 16 bits (`passes.weights.deltas`).
    """
    if array.size < _PIECE or array.ndim == 0:
        return steps
    for begin in range(len(steps)):
        count = 0
        while begin + count < len(steps) and steps[begin + count].by_element:
            count += 1
        if not count:
            continue
        dtype = _run(array[:1], steps[:begin], slice(0, 1)).dtype if begin else array.dtype
        table = _table(dtype, steps[begin : begin + count])
        if table is not None:
            shape = steps[begin - 1].shape if begin else array.shape
            return [*steps[:begin], _lookup_step(table, shape), *steps[begin + count :]]
    return steps


def _lookup_step(table: Array, shape: Shape) -> Step:
    return Step(lambda x, _: lookup(table, x), shape, by_element=True)


def _table(dtype: np.dtype[Any], steps: list[Step]) -> Array | None:
    """The result of steps by element for every code of a 16-bit type; None for other types, or a wider result."""
    if dtype.itemsize != 2:
        return None
    with np.errstate(all="ignore"):
        table = _run(all_codes(dtype), steps, slice(0, 1))
    return table if table.dtype.itemsize <= 2 else None


def to_bytes(array: Array) -> memoryview:
    """The bytes of an array as ONNX stores them: little endian, 4-bit types packed low nibble first."""
    array = np.ascontiguousarray(array)
    if array.dtype in _FOUR_BITS:
        array = _packed(array.view(np.uint8).reshape(-1))
    return array.reshape(-1).view(np.uint8).data


def _packed(codes: Array) -> Array:
    """Two of the lower nibbles of `codes` to a byte, the first one low; the last byte may be half empty."""
    packed = np.empty((codes.size + 1) // 2, np.uint8)
    for begin in range(0, codes.size, _PIECE):
        piece = codes[begin : begin + _PIECE]
        nibbles = scratch("nibbles", (piece.size + piece.size % 2,), np.uint8)
        nibbles[-1] = 0
        np.bitwise_and(piece, np.uint8(15), out=nibbles[: piece.size])
        pairs = nibbles.view("<u2")
        both = np.right_shift(pairs, np.uint16(4), out=scratch("pairs", pairs.shape, np.uint16))
        both |= pairs
        np.copyto(packed[begin // 2 : begin // 2 + both.size], both, casting="unsafe")  # the lower byte
    return packed


RecipeValues.evaluate = staticmethod(evaluate)
