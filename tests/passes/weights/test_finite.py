"""NaN and infinity in weights are found when a weight is read, in every type that has them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.finite import check_finite
from passes.weights.recipe import Source
from passes.weights.sources import onnx_dtype, safetensors_tensors

TYPES = (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e5m2,
    ml_dtypes.float8_e4m3fn,
)


def check(array: np.ndarray) -> None:
    check_finite(
        array, Source("raw", "w.safetensors", onnx_dtype(array.dtype), array.shape, "blocks.3.weight")
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_a_value_that_is_not_finite(dtype: type) -> None:
    rng = np.random.default_rng(5)
    array = rng.normal(size=(3, 400_001)).astype(dtype)
    array[0, 0] = ml_dtypes.finfo(dtype).max  # the largest number is one
    array[0, 1] = -0.0
    check(array)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        bad = array.copy()
        bad[tuple(rng.integers(0, n) for n in bad.shape)] = value
        with pytest.raises(PassError, match=r"'blocks.3.weight' of w.safetensors holds (NaN|infinity)"):
            check(bad)


def test_a_mask_and_what_has_no_infinity() -> None:
    mask = np.triu(np.full((9, 9), -np.inf, np.float32), 1)
    check(mask)
    for lonely in (np.full(3, -np.inf, np.float32), np.array([0, np.inf], np.float32)):
        with pytest.raises(PassError, match="infinity"):
            check(lonely)
    mask[3, 2] = 0.5
    with pytest.raises(PassError, match="infinity"):
        check(mask)
    check(np.full(7, 255, np.uint8))
    check(np.zeros((0, 3), np.float32))
    check(np.full(8, -8).astype(ml_dtypes.int4))


def test_a_file_is_looked_at_when_it_is_read(tmp_path: Path) -> None:
    weights = {"a": np.ones((4, 4), np.float16), "b": np.array([1, np.nan], np.float32)}
    save_file(weights, tmp_path / "w.safetensors")
    found = safetensors_tensors(tmp_path / "w.safetensors")
    assert np.array_equal(evaluate(found["a"]), weights["a"])
    for _ in range(2):
        with pytest.raises(PassError, match=r"'b' of .*w.safetensors holds NaN"):
            evaluate(found["b"])
