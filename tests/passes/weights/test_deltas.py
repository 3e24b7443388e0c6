"""Sums of low-rank products: the values of float64, one rounding, and the same bits however a weight is cut."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto

from passes.base import PassError
from passes.weights.deltas import Product, add_products
from passes.weights.evaluate import evaluate, tasks, to_bytes
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import keep

RNG = np.random.default_rng(17)
# Sizes with and without divisors; the larger ones are computed in several pieces.
SHAPES = [(96, 320), (101, 103), (1, 7), (640, 1031), (1024, 384)]


def products(shape: tuple[int, ...], *ranks: int) -> tuple[list[Product], Array]:
    """Products of these ranks, and their sum in float64."""
    found, total = [], np.zeros(shape)
    for rank in ranks:
        left = RNG.standard_normal((shape[0], rank)).astype(np.float16)
        right = RNG.standard_normal((rank, shape[1])).astype(np.float16)
        found.append(Product(keep(left), keep(right), 0.7))
        total += 0.7 * (left.astype(np.float64) @ right.astype(np.float64))
    return found, total


def weight(dtype: Any, shape: tuple[int, ...]) -> Array:
    return RNG.standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_is_that_of_float64(shape: tuple[int, int], dtype: Any) -> None:
    values = weight(dtype, shape)
    added, total = products(shape, 16, 3)
    got = evaluate(add_products(keep(values), added))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, values.astype(np.float64) + total, rtol=0, atol=2e-5)


@pytest.mark.parametrize("target", [TensorProto.BFLOAT16, TensorProto.FLOAT16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rounded_sum_is_the_sum_rounded(shape: tuple[int, int], target: int) -> None:
    """With the cast, the sum is computed in memory that is used again: nothing of another piece may be left in it."""
    added, _ = products(shape, 24)
    recipe = add_products(keep(weight(ml_dtypes.bfloat16, shape)), added)
    wanted = evaluate(Recipe.of_array(evaluate(recipe)).cast(target))
    parts = [task() for task in tasks(recipe.cast(target))]
    assert b"".join(bytes(to_bytes(part)) for part in parts) == bytes(to_bytes(wanted))


def test_a_sum_on_a_rounded_sum_reads_no_memory_of_its_own() -> None:
    shape = (512, 640)
    values = weight(np.float32, shape)
    first, one = products(shape, 8)
    second, two = products(shape, 5)
    twice = add_products(add_products(keep(values), first).cast(TensorProto.BFLOAT16).reshape(shape), second)
    wanted = (values + one).astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) + two
    # One step of bfloat16 where float32 and float64 fall to different sides of a tie.
    assert np.mean(np.abs(evaluate(twice) - wanted) > 2e-5) < 1e-3


@pytest.mark.parametrize(("columns", "rank"), [(32, 4), (48, 0)])
def test_factors_of_another_size_are_refused(columns: int, rank: int) -> None:
    added, _ = products((64, columns), rank)
    with pytest.raises(PassError, match="do not make"):
        add_products(keep(weight(np.float32, (64, 48))), added)
