"""Stored codes as recipes: what the operations of `passes.weights.stored_operations` are asked for by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onnx import TensorProto

from passes.base import PassError
from passes.weights.gguf_blocks import BLOCKS
from passes.weights.recipe import Op, Recipe, bits_of
from passes.weights.stored_operations import TILE_COLUMNS, TILE_ROWS, stored_shape


def _then(recipe: Recipe, name: str, **args: Any) -> Recipe:
    shape, dtype = stored_shape(name, args, recipe.shape), int(args.get("to", recipe.dtype))
    return replace(recipe, ops=(*recipe.ops, Op(name, args)), dtype=dtype, shape=shape)


def bits_as(recipe: Recipe, to: int) -> Recipe:
    """The same bytes as elements of type `to`, which is as wide; the other half of a type if it is half as wide.

    A 4-bit type takes two elements from each byte, the lower half first, as ONNX stores them.
    """
    if recipe.dtype == to:
        return recipe
    if not recipe.ops and recipe.source.kind == "raw":  # nothing is computed: the file is read as that type
        times = bits_of(recipe.dtype) // bits_of(to)
        shape = (*recipe.shape[:-1], recipe.shape[-1] * times) if times > 1 else recipe.shape
        return Recipe.of_source(replace(recipe.source, dtype=int(to), shape=shape))
    if bits_of(to) == 4:
        return unpack(recipe, to)
    return _then(recipe, "bits", to=int(to))


def unpack(recipe: Recipe, to: int, *, high_first: bool = False, offset: int = 0) -> Recipe:
    """Bytes [.., n] as 4-bit codes [.., 2n]; `offset` is subtracted from nibbles, 0 reads two's complement or E2M1."""
    if not high_first and not offset and not recipe.ops and recipe.source.kind == "raw":
        return bits_as(recipe, to)
    return _then(recipe, "unpack", to=int(to), high_first=high_first, offset=offset)


def unpack_rows(recipe: Recipe, to: int) -> Recipe:
    """Bytes [n, ..] as 4-bit codes [2n, ..]: the lower half of byte (i, k) is row 2i, the upper one row 2i + 1."""
    return _then(recipe, "unpack_rows", to=int(to))


def unswizzle(recipe: Recipe, rows: int, columns: int) -> Recipe:
    """Block scales in cuBLAS tiles as a plain [rows, columns]. Raises PassError when there are not that many."""
    wanted = (-(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // TILE_COLUMNS) * TILE_COLUMNS)
    if recipe.shape != wanted:
        raise PassError(
            f"scales for {rows} x {columns} blocks in tiles are {wanted}, and these are {recipe.shape}"
        )
    return _then(recipe, "unswizzle", rows=rows, columns=columns)


def pack(recipe: Recipe, *, high_first: bool = False) -> Recipe:
    """4-bit codes [.., 2n] as bytes [.., n]."""
    return _then(recipe, "pack", high_first=high_first, to=int(TensorProto.UINT8))


def pack_rows(recipe: Recipe) -> Recipe:
    """4-bit codes [2n, ..] as bytes [n, ..], two rows to a byte. Raises PassError for an odd number of rows."""
    if recipe.shape[0] % 2:
        raise PassError(f"{recipe.shape[0]} rows do not go two to a byte")
    return _then(recipe, "pack_rows", to=int(TensorProto.UINT8))


def swizzle(recipe: Recipe) -> Recipe:
    """Block scales [rows, columns] in cuBLAS tiles, padded with zeros to whole ones."""
    rows, columns = (-(-n // t) * t for n, t in zip(recipe.shape, (TILE_ROWS, TILE_COLUMNS), strict=True))
    return _then(recipe, "swizzle", rows=rows, columns=columns)


def power_of_two(recipe: Recipe) -> Recipe:
    """E8M0 bytes (an exponent + 127) as that power of two, float32."""
    return _then(recipe, "exponent", to=int(TensorProto.FLOAT))


def reciprocal(recipe: Recipe) -> Recipe:
    """1 / x in float32."""
    return _then(recipe, "reciprocal", to=int(TensorProto.FLOAT))


def of_gguf(blocks: Recipe, kind: str, columns: int) -> Recipe:
    """Rows of GGUF blocks as bytes [N, n] -> what they stand for, float32 [N, columns].

    Q4_0 is codes with a scale for 32 elements, which DequantizeLinear has; others are computed.
    """
    size = BLOCKS[kind].elements
    if kind != "Q4_0":
        return _then(blocks, "gguf_values", type=kind, columns=columns, to=int(TensorProto.FLOAT))
    codes = _then(blocks, "gguf_codes", type=kind, columns=columns, to=int(TensorProto.INT4))
    scales = _then(blocks, "gguf_scales", type=kind, columns=columns // size, to=int(TensorProto.FLOAT))
    return codes.dequantize(scales, len(blocks.shape) - 1, size)
