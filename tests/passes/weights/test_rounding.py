"""Rounding by table against ml_dtypes' casts: every bfloat16, ties and their neighbours, special values."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from passes.weights.rounding import all_codes, lookup, nearest, scratch

TYPES = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("step", [-1, 0, 1])
def test_around_every_bfloat16(dtype: Any, step: int) -> None:
    """All numbers of 16 bits, and the float32 just below and above each: no tie falls to the wrong side."""
    with np.errstate(all="ignore"):
        values = all_codes(np.dtype(ml_dtypes.bfloat16)).astype(np.float32)
        bits = values.view(np.uint32).astype(np.int64) + step
        x = np.clip(bits, 0, 2**32 - 1).astype(np.uint32).view(np.float32)
        assert np.array_equal(nearest(x, dtype).view(np.uint8), x.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("dtype", [*TYPES, np.dtype(np.int8), np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("size", [1, 5000])
def test_small_arrays_and_other_types_are_cast(dtype: Any, size: int) -> None:
    x = (np.random.default_rng(size).standard_normal((size, 1)) * 3).astype(np.float32)
    got = nearest(x, dtype)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    assert np.array_equal(got.view(np.uint8), x.astype(dtype).view(np.uint8))


@pytest.mark.parametrize(
    "dtype", [np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16)], ids=str
)
def test_a_table_has_a_value_for_every_code(dtype: Any) -> None:
    codes = all_codes(dtype)
    assert codes.size == 1 << 8 * dtype.itemsize
    table = np.random.default_rng(0).integers(0, 256, codes.size).astype(np.uint8)
    picked = np.random.default_rng(1).permutation(codes.size)[:200].reshape(10, 20)
    assert np.array_equal(lookup(table, codes[picked]), table[picked])


def test_threads_have_scratch_memory_of_their_own() -> None:
    mine = scratch("test", (4, 8), np.float32)
    assert mine.shape == (4, 8)
    assert scratch("test", (2,), np.float32).base is mine.base
    assert scratch("test", (64,), np.float32).size == 64
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("test", (2,), np.float32)))
    thread.start()
    thread.join()
    assert found[0].base is not scratch("test", (2,), np.float32).base
