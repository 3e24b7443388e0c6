"""Recipes as data: shapes and types before anything is computed, JSON and back, what rows they join."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from passes.base import PassError
from passes.weights.evaluate import evaluate, to_bytes
from passes.weights.recipe import (
    Recipe,
    RecipeValues,
    Source,
    bits_of,
    constant,
    default_opset,
    dtype_of,
    recipe_of,
)
from tests.passes.graph_helpers import pick

F16, I8 = int(TensorProto.FLOAT16), int(TensorProto.INT8)


def random(rng: np.random.Generator, *shape: int) -> Recipe:
    return Recipe.of_array(rng.standard_normal(shape).astype(np.float32))


def steps(rng: np.random.Generator, recipe: Recipe) -> Recipe:
    """A recipe with one operation more, of those that fit its type and shape."""
    scale = Recipe.of_array(np.array(0.02, np.float32))
    choices: list[Callable[[], Recipe]] = [
        lambda: recipe.cast(pick(rng, F16, int(TensorProto.BFLOAT16), int(TensorProto.FLOAT))),
        lambda: recipe.transpose(tuple(int(i) for i in rng.permutation(len(recipe.shape)))),
        lambda: recipe.reshape((-1 * -int(np.prod(recipe.shape)),)).reshape(recipe.shape[::-1]),
        lambda: recipe.multiply(random(rng, recipe.shape[-1])),
        lambda: recipe.append([recipe, recipe]),
        lambda: recipe.cast(int(TensorProto.FLOAT)).quantize(scale, I8).dequantize(scale),
    ]
    return choices[rng.integers(len(choices))]()


@pytest.mark.parametrize("seed", range(30))
def test_shape_and_type_are_known_before_the_values(seed: int) -> None:
    rng = np.random.default_rng(seed)
    recipe = random(rng, 4, 6)
    for _ in range(int(rng.integers(1, 6))):
        recipe = steps(rng, recipe)
    result = evaluate(recipe)
    assert (result.shape, helper.np_dtype_to_tensor_dtype(result.dtype)) == (recipe.shape, recipe.dtype)
    assert recipe.nbytes == len(bytes(to_bytes(result)))
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again.to_json() == recipe.to_json()
    assert np.array_equal(evaluate(again), result, equal_nan=True)
    assert Recipe.of_tensor(recipe.to_tensor("w")) == again


@pytest.mark.parametrize("seed", range(8))
def test_joined_rows_come_apart_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [random(rng, int(rng.integers(1, 5)), 6).cast(F16) for _ in range(3)]
    joined = parts[0].append(parts[1:])
    assert list(joined.rows) == parts
    assert np.array_equal(evaluate(joined), np.concatenate([evaluate(part) for part in parts]))
    assert joined.transpose((1, 0)).rows == (joined.transpose((1, 0)),)  # the join is not what came last
    assert [source.key for source in joined.sources] == [part.source.key for part in parts]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda r: r.reshape((5, 5)), r"cannot reshape a weight of shape \(4, 6\) to \(5, 5\)"),
        (lambda r: r.append([r.cast(F16)]), "have no rows in common"),
        (lambda r: r.append([r.transpose((1, 0))]), "have no rows in common"),
        (lambda r: r.mxfp8_scales(4), r"no whole blocks of 4 along its last axis"),
        (lambda r: r.nvfp4_scales(r, 16), "no whole blocks of 16"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_computed(
    make: Callable[[Recipe], Recipe], said: str
) -> None:
    with pytest.raises(PassError, match=said):
        make(random(np.random.default_rng(0), 4, 6))


def test_operations_that_change_nothing_are_none() -> None:
    recipe = random(np.random.default_rng(1), 4, 6)
    assert recipe.cast(int(TensorProto.FLOAT)) is recipe
    assert recipe.transpose((0, 1)) is recipe


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (TensorProto.INT4, 4),
        (TensorProto.FLOAT4E2M1, 4),
        (TensorProto.FLOAT8E4M3FN, 8),
        (TensorProto.BFLOAT16, 16),
    ],
)
def test_bytes_of_narrow_types(dtype: int, bits: int) -> None:
    assert bits_of(dtype) == bits
    recipe = Recipe.of_source(Source("raw", "/x", dtype, (3, 5)))
    assert recipe.nbytes == (15 * bits + 7) // 8


def test_a_constant_of_a_recipe_computes_when_it_is_asked() -> None:
    recipe = random(np.random.default_rng(2), 4, 6).cast(F16)
    made = constant("w", recipe)
    assert recipe_of(made) == recipe
    assert (made.shape, dtype_of(made)) == ([4, 6], F16)
    assert np.array_equal(made.values, evaluate(recipe))
    assert recipe_of(gs.Constant("v", np.ones(2))) is recipe_of(gs.Variable("x")) is None
    with pytest.raises(PassError, match="initializer 'v' has no recipe"):
        RecipeValues(TensorProto(name="v"))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(np.float32, 1), (np.dtype(ml_dtypes.bfloat16), 16), (23, 23), (None, None), (np.dtype("int64"), 7)],
)
def test_types_of_tensors_in_every_spelling(dtype: Any, expected: int | None) -> None:
    assert dtype_of(gs.Variable("x", dtype)) == expected


def test_the_opset_of_the_default_domain() -> None:
    imports = [helper.make_opsetid("trt", 1), helper.make_opsetid("ai.onnx", 21)]
    assert default_opset(imports) == 21
    assert default_opset(imports[:1]) is None
