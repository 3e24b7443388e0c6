"""Rows and joins of recipes: the same values as of arrays, and no more read than is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from safetensors.numpy import save_file

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.moves import joined, part, rows, split_at_dequantize
from passes.weights.recipe import Recipe
from passes.weights.sources import safetensors_tensors
from passes.weights.stored import unpack

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """Matrices [12, 32] of several types in a file, and scales for them."""
    generator = np.random.default_rng(5)
    arrays: dict[str, Any] = {
        "plain": generator.normal(size=(12, 32)).astype(np.float32),
        "codes": generator.integers(-127, 128, (12, 32), dtype=np.int8),
        "bytes": generator.integers(0, 256, (12, 16), dtype=np.uint8),
        "channel": generator.uniform(0.1, 1, 12).astype(np.float32),
        "blocks": generator.uniform(0.1, 1, (12, 2)).astype(np.float32),
        "tensor": np.array(0.3, np.float32),
    }
    path = tmp_path_factory.mktemp("moves") / "m.safetensors"
    save_file(arrays, path)
    return safetensors_tensors(path)


def made(stored: dict[str, Recipe]) -> dict[str, Recipe]:
    """Weights of every kind that a model file has."""
    four = unpack(stored["bytes"], TensorProto.INT4, high_first=True, offset=8)
    return {
        "plain": stored["plain"],
        "cast": stored["plain"].cast(TensorProto.BFLOAT16),
        "per tensor": stored["codes"].dequantize(stored["tensor"]),
        "per row": stored["codes"].dequantize(stored["channel"], 0).cast(TensorProto.FLOAT16),
        "blocks": four.dequantize(stored["blocks"], 1, 16),
        "scaled": stored["plain"].multiply(stored["channel"].reshape((12, 1))),
        "columns": stored["plain"].transpose((1, 0)).reshape((4, 8, 12)).reshape((12, 32)),
    }


KINDS = ("plain", "cast", "per tensor", "per row", "blocks", "scaled", "columns")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("begin", "end"), [(0, 4), (4, 8), (5, 12), (3, 3), (0, 12)])
def test_rows_are_those_of_the_array(kind: str, begin: int, end: int, stored: dict[str, Recipe]) -> None:
    recipe = made(stored)[kind]
    cut = rows(recipe, begin, end)
    assert cut.shape == (end - begin, 32)
    np.testing.assert_array_equal(evaluate(cut), evaluate(recipe)[begin:end])


@pytest.mark.parametrize("kind", ["plain", "cast", "per tensor", "per row", "blocks", "scaled"])
def test_rows_read_a_third_of_the_file_for_a_third_of_a_weight(kind: str, stored: dict[str, Recipe]) -> None:
    recipe = made(stored)[kind]
    assert rows(recipe, 4, 8).source.length * 3 == recipe.source.length


def test_rows_of_rows_and_parts_of_columns(stored: dict[str, Recipe]) -> None:
    recipe = made(stored)["per row"]
    values = evaluate(recipe)
    np.testing.assert_array_equal(evaluate(rows(rows(recipe, 2, 10), 1, 3)), values[3:5])
    np.testing.assert_array_equal(evaluate(part(recipe, 1, 5, 9)), values[:, 5:9])
    np.testing.assert_array_equal(evaluate(rows(part(recipe, -1, 5, 9), 1, 3)), values[1:3, 5:9])


@pytest.mark.parametrize("kind", ["per tensor", "per row"])
def test_rows_joined_again_are_stored_codes(kind: str, stored: dict[str, Recipe]) -> None:
    recipe = made(stored)[kind]
    swapped = joined([rows(recipe, 6, 12), rows(recipe, 0, 6)])
    np.testing.assert_array_equal(evaluate(swapped), np.roll(evaluate(recipe), 6, axis=0))
    found = split_at_dequantize(swapped)
    assert found is not None
    assert found[0].dtype == TensorProto.INT8


def test_what_is_scaled_differently_is_joined_as_values(stored: dict[str, Recipe]) -> None:
    per_tensor, per_row = made(stored)["per tensor"], made(stored)["per row"].cast(TensorProto.FLOAT)
    both = joined([per_tensor, per_row])
    np.testing.assert_array_equal(evaluate(both), np.concatenate([evaluate(per_tensor), evaluate(per_row)]))


def test_columns_are_joined(stored: dict[str, Recipe]) -> None:
    plain = stored["plain"]
    np.testing.assert_array_equal(evaluate(joined([plain, plain], 1)), np.hstack([evaluate(plain)] * 2))


def test_rows_that_are_not_there_are_refused(stored: dict[str, Recipe], tmp_path: Path) -> None:
    del tmp_path
    with pytest.raises(PassError, match="no rows 4 to 13"):
        rows(stored["plain"], 4, 13)
