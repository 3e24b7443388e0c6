"""Rounding float32 to the 8-bit and 4-bit floats by table: the results of ml_dtypes' casts, many times faster.

A float32 is first cut to the upper 16 bits of it, the last of them set where anything was cut off ("rounding to
odd"). bfloat16 has four bits of mantissa more than E4M3 needs, so the cut number lies on the same side of every tie
as the float32 did, and a table over its 65,536 codes holds the answers.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from passes.weights.recipe import Array

_TABLED = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn))
_SMALL = 1 << 12
"""Below this many elements a cast is faster than a table that is not in the cache."""

_LARGEST = 1 << 24
"""Bytes of scratch memory that a thread keeps."""


def nearest(x: Array, dtype: np.dtype[Any]) -> Array:
    """float32 to `dtype`, to nearest with ties to even: the bits of `x.astype(dtype)`, special values included."""
    if dtype not in _TABLED or x.size < _SMALL or x.dtype != np.float32:
        return x.astype(dtype)
    bits = np.ascontiguousarray(x).view(np.uint32)
    key = np.bitwise_and(bits, np.uint32(0xFFFF), out=scratch("key", x.shape, np.uint32))
    key += np.uint32(0xFFFF)  # carries into the upper half when anything is set in the lower one
    key |= bits
    key >>= np.uint32(16)
    return _taken(_table(dtype), key).view(dtype)


def _taken(table: Array, codes: Array) -> Array:
    """table[codes]; the codes fit the table."""
    places = scratch("places", codes.shape, np.intp)
    np.copyto(places, codes)
    return np.take(table, places, mode="wrap")  # wrap checks nothing, as nothing need be checked


_LOCAL = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """An array with arbitrary values, of the same memory at each call with that name in this thread.

    Numpy's temporary arrays go back to the system and come again page by page, which costs more than the arithmetic.
    """
    size = math.prod(shape)
    held: Array | None = getattr(_LOCAL, name, None)
    if held is None or held.size < size or held.dtype != dtype:
        held = np.empty(size, dtype)
        if held.nbytes <= _LARGEST:
            setattr(_LOCAL, name, held)
    return held[:size].reshape(shape)


@lru_cache(maxsize=4)
def _table(dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return all_codes(np.dtype(ml_dtypes.bfloat16)).astype(np.float32).astype(dtype).view(np.uint8)


def all_codes(dtype: np.dtype[Any]) -> Array:
    """Every value of an 8-bit or 16-bit type, at the place of its code: [256] or [65536]."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.arange(1 << 8 * dtype.itemsize, dtype=np.uint32).astype(unsigned).view(dtype)


def lookup(table: Array, x: Array) -> Array:
    """`table[code]` of every element of `x`; `table` has a value for each code of its 8-bit or 16-bit type."""
    codes = x.view(np.dtype(f"u{x.dtype.itemsize}"))
    return _taken(table.view(np.dtype(f"u{table.dtype.itemsize}")), codes).view(table.dtype)
