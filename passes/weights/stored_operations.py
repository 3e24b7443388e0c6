"""Recipe operations that read what other tools have stored: packed codes, scales in tiles, blocks of GGUF.

Each gives the codes or scales as ONNX has them, so that `dequantize` after it is DequantizeLinear. They move bits only;
`gguf_values` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from passes.weights.gguf_blocks import BLOCKS
from passes.weights.recipe import Array
from passes.weights.sources import np_dtype
from passes.weights.step import Evaluate, Shape, Step

TILE_ROWS, TILE_COLUMNS = 128, 4
"""Block scales that cuBLAS reads together: NVIDIA's "swizzled" layout."""


def stored_shape(name: str, args: Mapping[str, Any], shape: Shape) -> Shape:
    """The shape that one of `STORED_BINDERS` gives for an input of `shape`."""
    if name == "slice":
        axis = args["axis"]
        return (*shape[:axis], args["end"] - args["begin"], *shape[axis + 1 :])
    if name == "unpack":
        return (*shape[:-1], 2 * shape[-1])
    if name == "unpack_rows":
        return (2 * shape[0], *shape[1:])
    if name == "pack":
        return (*shape[:-1], shape[-1] // 2)
    if name == "pack_rows":
        return (shape[0] // 2, *shape[1:])
    if name in ("swizzle", "unswizzle"):
        return args["rows"], args["columns"]
    if name in ("gguf_values", "gguf_codes", "gguf_scales"):
        return (*shape[:-1], args["columns"])
    return shape


def _slice(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    place = (*(slice(None),) * args["axis"], slice(args["begin"], args["end"]))
    result = stored_shape("slice", args, shape)
    return Step(lambda x, _: x[place], result, by_rows=args["axis"] > 0)


def _codes(nibbles: Array, args: Mapping[str, Any]) -> Array:
    """Nibbles (uint8, 0 to 15) as codes: minus `offset` as INT4, or two's complement, or E2M1 bits."""
    if args["to"] != TensorProto.INT4:
        return nibbles.view(np_dtype(args["to"]))
    offset = args.get("offset", 0)
    signed = nibbles.astype(np.int8) - offset if offset else (nibbles ^ 8).astype(np.int8) - 8
    return signed.astype(np_dtype(args["to"]))


def _unpack(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Bytes [.., n] -> codes [.., 2n]; `high_first`: the upper nibble is the first of the two."""

    def run(x: Array, _: slice) -> Array:
        pair = (x >> 4, x & 15) if args["high_first"] else (x & 15, x >> 4)
        return _codes(np.stack(pair, axis=-1).reshape(*x.shape[:-1], 2 * x.shape[-1]), args)

    return Step(run, stored_shape("unpack", args, shape), by_rows=len(shape) > 1)


def _unpack_rows(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Bytes [n, ..] -> codes [2n, ..]: byte (i, k) holds rows 2i (lower nibble) and 2i + 1 (upper) of column k."""

    def run(x: Array, _: slice) -> Array:
        return _codes(np.stack((x & 15, x >> 4), axis=1).reshape(-1, *x.shape[1:]), args)

    return Step(run, stored_shape("unpack_rows", args, shape), by_rows=False)


def _unswizzle(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Scales [R, C] in tiles of 128 rows and 4 columns -> their first rows and columns in plain order.

    In a tile of 512, scale (r, c) lies at (r % 32) * 16 + (r // 32) * 4 + c; tiles follow each other by columns
    (cuBLAS, "1D block scaling factors layout").
    """
    rows, columns = shape

    def run(x: Array, _: slice) -> Array:
        tiles = x.reshape(rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
        plain = tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)
        return np.ascontiguousarray(plain[: args["rows"], : args["columns"]])

    return Step(run, stored_shape("unswizzle", args, shape), by_rows=False)


def swizzled(scales: Array) -> Array:
    """The inverse of `unswizzle`: scales [rows, columns], padded with zeros to whole tiles [R, C]."""
    rows, columns = (-(-n // t) * t for n, t in zip(scales.shape, (TILE_ROWS, TILE_COLUMNS), strict=True))
    padded = np.zeros((rows, columns), scales.dtype)
    padded[: scales.shape[0], : scales.shape[1]] = scales
    tiles = padded.reshape(rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(rows, columns)


def _pack(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Codes of 4 bits [.., 2n] -> bytes [.., n]; `high_first`: the first of two in the upper half."""

    def run(x: Array, _: slice) -> Array:
        codes = np.ascontiguousarray(x).view(np.uint8) & 15
        first, second = codes[..., 0::2], codes[..., 1::2]
        return first << 4 | second if args["high_first"] else first | second << 4

    return Step(run, stored_shape("pack", args, shape), by_rows=len(shape) > 1)


def _pack_rows(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Codes of 4 bits [2n, ..] -> bytes [n, ..]: row 2i in the lower half, row 2i + 1 in the upper."""

    def run(x: Array, _: slice) -> Array:
        codes = np.ascontiguousarray(x).view(np.uint8) & 15
        return codes[0::2] | codes[1::2] << 4

    return Step(run, stored_shape("pack_rows", args, shape), by_rows=False)


def _swizzle(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """The inverse of `unswizzle`, padded with zeros."""
    return Step(lambda x, _: swizzled(x), stored_shape("swizzle", args, shape), by_rows=False)


def _exponent(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """UINT8 (an exponent + 127) -> that power of two in float32."""
    del args

    def run(x: Array, _: slice) -> Array:
        return np.ldexp(np.float32(1), x.view(np.uint8).astype(np.int32) - 127)

    return Step(run, shape, by_element=True)


def _reciprocal(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """1 / x in float32."""
    del args
    return Step(lambda x, _: np.float32(1) / x.astype(np.float32), shape, by_element=True)


def _bits(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """The same bytes as elements of another type of that size."""
    return Step(lambda x, _: np.ascontiguousarray(x).view(np_dtype(args["to"])), shape, by_element=True)


def _gguf_values(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Rows of GGUF blocks as bytes [.., n] -> float32 [.., columns]."""
    block = BLOCKS[args["type"]]

    def run(x: Array, _: slice) -> Array:
        values = block.values(np.ascontiguousarray(x).reshape(-1, block.nbytes))
        return values.reshape(*x.shape[:-1], args["columns"])

    return Step(run, stored_shape("gguf_values", args, shape), by_rows=len(shape) > 1)


def _gguf_codes(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Rows of Q4_0 blocks as bytes -> their codes, INT4 [.., columns]."""
    nbytes, to = BLOCKS[args["type"]].nbytes, np_dtype(args["to"])

    def run(x: Array, _: slice) -> Array:
        body = np.ascontiguousarray(x).reshape(-1, nbytes)[:, 2:]
        # Lower nibbles are elements 0 to 15, upper ones 16 to 31.
        codes = np.concatenate((body & 15, body >> 4), axis=1).astype(np.int8) - np.int8(8)
        return codes.astype(to).reshape(*x.shape[:-1], args["columns"])

    return Step(run, stored_shape("gguf_codes", args, shape), by_rows=len(shape) > 1)


def _gguf_scales(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Rows of Q4_0 blocks as bytes -> the float16 scale of every block, in float32 [.., columns]."""
    nbytes = BLOCKS[args["type"]].nbytes

    def run(x: Array, _: slice) -> Array:
        head = np.ascontiguousarray(np.ascontiguousarray(x).reshape(-1, nbytes)[:, :2])
        return head.view("<f2").astype(np.float32).reshape(*x.shape[:-1], args["columns"])

    return Step(run, stored_shape("gguf_scales", args, shape), by_rows=len(shape) > 1)


def _swap_nibbles(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    """Bytes whose two halves change places."""
    del args
    return Step(lambda x, _: (x << 4 | x >> 4).astype(np.uint8), shape, by_element=True)


STORED_BINDERS: dict[str, Callable[[Mapping[str, Any], Shape, Evaluate], Step]] = {
    "slice": _slice,
    "unpack": _unpack,
    "unpack_rows": _unpack_rows,
    "unswizzle": _unswizzle,
    "pack": _pack,
    "pack_rows": _pack_rows,
    "swizzle": _swizzle,
    "exponent": _exponent,
    "reciprocal": _reciprocal,
    "bits": _bits,
    "gguf_values": _gguf_values,
    "gguf_codes": _gguf_codes,
    "gguf_scales": _gguf_scales,
    "swap_nibbles": _swap_nibbles,
}
