"""Rows, slices and joins of recipes that read no more of a file than they give.

A cut moves towards the source: over casts and scales to the bytes, where rows are a shorter stretch of the file. So
the query's rows of a joined, quantized weight are its codes' rows and its scales' rows, and stay stored codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from onnx import TensorProto

from passes.base import PassError
from passes.weights.recipe import Op, Recipe, bits_of
from passes.weights.stored_operations import STORED_BINDERS, stored_shape

_BY_ELEMENT = ("cast", "scale_of_amax", "exponent", "reciprocal", "bits", "swap_nibbles")
"""Operations that make an element of that element alone."""
_QUANTIZED = {
    "nvfp4_scales": TensorProto.FLOAT8E4M3FN,
    "nvfp4_values": TensorProto.FLOAT4E2M1,
    "mxfp8_scales": TensorProto.UINT8,
    "mxfp8_values": TensorProto.FLOAT8E4M3FN,
}
"""The types that operations on blocks make."""
_BY_ROW = (*_QUANTIZED, "unpack", "gguf_values", "gguf_codes", "gguf_scales", "spread_blocks")
"""Operations that make row i of row i alone, and have no argument with rows."""


def rows(recipe: Recipe, begin: int, end: int) -> Recipe:
    """The rows from `begin` to `end`, which is left out, of a recipe with at least one axis.

    Raises PassError when they are not rows of it.
    """
    if not recipe.shape or not 0 <= begin <= end <= recipe.shape[0]:
        raise PassError(f"a weight of shape {recipe.shape} has no rows {begin} to {end}")
    if (begin, end) == (0, recipe.shape[0]):
        return recipe
    return _moved(recipe, begin, end) or _cut(recipe, 0, begin, end)


def part(recipe: Recipe, axis: int, begin: int, end: int) -> Recipe:
    """The elements from `begin` to `end`, which is left out, along `axis`."""
    axis %= len(recipe.shape)
    if axis == 0:
        return rows(recipe, begin, end)
    return recipe if (begin, end) == (0, recipe.shape[axis]) else _cut(recipe, axis, begin, end)


def joined(recipes: Sequence[Recipe], axis: int = 0) -> Recipe:
    """The recipes one after another along `axis`. Raises PassError when their shapes or types do not agree.

    Rows that are dequantized alike are joined as codes, with their scales where each row has its own.
    """
    first, *others = recipes
    if not others:
        return first
    if axis:
        order = (axis, *(i for i in range(len(first.shape)) if i != axis))
        back = tuple(order.index(i) for i in range(len(order)))
        return joined([recipe.transpose(order) for recipe in recipes]).transpose(back)
    return _joined_codes(recipes) or _joined_before(recipes) or first.append(others)


def _joined_before(recipes: Sequence[Recipe]) -> Recipe | None:
    """The recipes joined before an operation on single elements that all of them end with."""
    last = [recipe.ops[-1] if recipe.ops else None for recipe in recipes]
    if last[0] is None or last[0].name != "exponent" or any(op != last[0] for op in last):
        return None
    inner = [found for recipe in recipes if (found := before(recipe)) is not None]
    if len(inner) != len(recipes):
        return None
    whole = joined(inner)
    return Recipe(whole.source, (*whole.ops, last[0]), recipes[0].dtype, whole.shape)


def _cut(recipe: Recipe, axis: int, begin: int, end: int) -> Recipe:
    shape = (*recipe.shape[:axis], end - begin, *recipe.shape[axis + 1 :])
    return replace(
        recipe, ops=(*recipe.ops, Op("slice", {"axis": axis, "begin": begin, "end": end})), shape=shape
    )


def _moved(recipe: Recipe, begin: int, end: int) -> Recipe | None:
    """The same rows, cut before the last operation; None where that operation mixes rows."""
    if not recipe.ops:
        return _of_source(recipe, begin, end)
    op, shape = recipe.ops[-1], (end - begin, *recipe.shape[1:])
    args = _arguments(op, recipe.shape, begin, end)
    if args is None:
        return None
    ahead = before(recipe)
    if ahead is None or not ahead.shape or ahead.shape[0] != recipe.shape[0]:
        return None
    inner = rows(ahead, begin, end)
    return Recipe(inner.source, (*inner.ops, Op(op.name, args)), recipe.dtype, shape)


def _of_source(recipe: Recipe, begin: int, end: int) -> Recipe | None:
    """A shorter stretch of a file, where rows are whole bytes of it."""
    source = recipe.source
    bits = math.prod(recipe.shape[1:]) * bits_of(source.dtype)
    if source.kind != "raw" or bits % 8:
        return None
    shape, row = (end - begin, *recipe.shape[1:]), bits // 8
    cut = replace(source, shape=shape, offset=source.offset + begin * row, length=(end - begin) * row)
    return Recipe.of_source(cut)


def _arguments(op: Op, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any] | None:
    """The arguments of an operation for some of its rows; None where it mixes rows."""
    args = dict(op.args)
    if op.name in _BY_ELEMENT or op.name in _BY_ROW:
        return args
    if op.name == "reshape" and len(args["shape"]) > 1:
        return args | {"shape": [end - begin, *args["shape"][1:]]}
    if op.name == "multiply":
        by = Recipe.from_json(args["by"])
        has_rows = len(by.shape) == len(shape) and by.shape[0] > 1
        return args | {"by": rows(by, begin, end).to_json()} if has_rows else args
    if op.name in ("dequantize", "quantize"):
        scale, axis = Recipe.from_json(args["scale"]), args["axis"]
        if axis is None or not scale.shape:
            return args
        own = axis % len(shape) == 0 and not args["block_size"]
        if own or (args["block_size"] and axis % len(shape) != 0):
            return args | {"scale": rows(scale, begin, end).to_json()}
    return None


def before(recipe: Recipe) -> Recipe | None:
    """The recipe without its last operation; None where its shape and type cannot be told."""
    ops = recipe.ops[:-1]
    if not ops:
        return Recipe.of_source(recipe.source)
    known = _result(Recipe.of_source(recipe.source), ops)
    return None if known is None else Recipe(recipe.source, ops, *known)


def _result(start: Recipe, ops: Sequence[Op]) -> tuple[int, tuple[int, ...]] | None:
    """Type and shape after `ops`; None after one that is not known here."""
    dtype, shape = start.dtype, start.shape
    for op in ops:
        if op.name in ("cast", "quantize"):
            dtype = op.args["to"]
        elif op.name in _QUANTIZED:
            dtype = int(_QUANTIZED[op.name])
            if op.name.endswith("_scales"):
                shape = (*shape[:-1], shape[-1] // op.args["block_size"])
        elif op.name == "scale_of_amax":
            dtype = int(TensorProto.FLOAT)
        elif op.name == "spread_blocks":
            shape = (*shape[:-1], op.args["length"])
        elif op.name == "transpose":
            shape = tuple(shape[i] for i in op.args["perm"])
        elif op.name == "reshape":
            shape = tuple(op.args["shape"])
        elif op.name == "dequantize":
            dtype = op.args["to"]
        elif op.name == "append":
            shape = (shape[0] + sum(item["shape"][0] for item in op.args["others"]), *shape[1:])
        elif op.name in STORED_BINDERS:
            dtype, shape = op.args.get("to", dtype), stored_shape(op.name, op.args, shape)
        elif op.name not in ("multiply", "subtract_product"):
            return None
    return dtype, shape


def split_at_dequantize(recipe: Recipe) -> tuple[Recipe, Op, tuple[Op, ...]] | None:
    """(codes, the last dequantization, what follows it); None where nothing is dequantized."""
    for index in range(len(recipe.ops) - 1, -1, -1):
        if recipe.ops[index].name == "dequantize":
            known = _result(Recipe.of_source(recipe.source), recipe.ops[:index])
            if known is None:
                return None
            codes = Recipe(recipe.source, recipe.ops[:index], *known)
            return codes, recipe.ops[index], recipe.ops[index + 1 :]
    return None


def _joined_codes(recipes: Sequence[Recipe]) -> Recipe | None:
    """Rows of stored codes that are dequantized by one scale, or by one for each row, joined as codes."""
    found = [split_at_dequantize(recipe) for recipe in recipes]
    parts = [item for item in found if item is not None]
    if len(parts) != len(recipes) or any(after != parts[0][2] for _, _, after in parts):
        return None
    codes = [item[0] for item in parts]
    if any(op.name != "cast" for op in parts[0][2]) or any(bits_of(c.dtype) < 8 for c in codes):
        return None
    args = [dict(op.args) for _, op, _ in parts]
    scales = [Recipe.from_json(arg.pop("scale")) for arg in args]
    if any(arg != args[0] for arg in args) or any(s.shape[1:] != scales[0].shape[1:] for s in scales):
        return None
    if args[0]["axis"] is None or not scales[0].shape:
        if any(scale != scales[0] for scale in scales):
            return None
        scale = scales[0]
    elif args[0]["axis"] == 0 or args[0]["block_size"]:
        scale = joined(scales)
    else:
        return None
    whole = joined(codes).dequantize(scale, args[0]["axis"], args[0]["block_size"])
    for op in parts[0][2]:
        whole = whole.cast(op.args["to"])
    return whole
