"""Operations of recipes, bound to their arguments: rows by themselves are the rows of the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.operations import bind
from passes.weights.recipe import Op, Recipe

RNG = np.random.default_rng(6)
X = RNG.standard_normal((6, 32)).astype(np.float32)


def array(*shape: int) -> Recipe:
    return Recipe.of_array(RNG.uniform(0.05, 0.2, shape).astype(np.float32))


BASE = Recipe.of_array(X)
RECIPES: dict[str, Recipe] = {
    "cast": BASE.cast(10),
    "transpose": BASE.transpose((1, 0)),
    "reshape": BASE.reshape((12, 16)),
    "multiply by columns": BASE.multiply(array(32)),
    "multiply by rows": BASE.multiply(array(6, 1)),
    "subtract a product": BASE.subtract_product(array(6, 2), array(2, 32)),
    "quantize": BASE.quantize(array(), 3),
    "quantize rows": BASE.quantize(array(6), 3, 0),
    "quantize columns": BASE.quantize(array(32), 3, 1),
    "quantize blocks": BASE.quantize(array(6, 4), 3, 1, 8),
    "dequantize blocks": BASE.dequantize(array(6, 4), 1, 8),
    "amax": BASE.amax(),
    "scale of amax": BASE.scale_of_amax(127),
    "spread blocks": BASE.spread_blocks(2, 60),
    "append": BASE.append([BASE, BASE]),
    "nvfp4 values": BASE.nvfp4_values(array(), 16),
    "mxfp8 scales": BASE.mxfp8_scales(32),
}


@pytest.mark.parametrize("name", RECIPES)
def test_rows_by_themselves_are_rows_of_the_whole(name: str) -> None:
    recipe = RECIPES[name]
    step = bind(recipe.ops[-1], X.shape, evaluate)
    whole: Any = np.asarray(step.run(X, slice(0, 6)))
    assert step.shape == recipe.shape
    assert np.array_equal(whole, evaluate(recipe))
    assert step.by_rows or not step.by_element
    if step.by_rows and whole.shape[:1] == (6,):
        for begin, end in ((0, 1), (2, 5), (5, 6)):
            part = np.asarray(step.run(X[begin:end], slice(begin, end)))
            assert np.array_equal(part, whole[begin:end])


def test_what_needs_more_than_its_row_says_so() -> None:
    by_rows = {name: bind(recipe.ops[-1], X.shape, evaluate).by_rows for name, recipe in RECIPES.items()}
    assert not any(by_rows[name] for name in ("transpose", "reshape", "amax", "append"))
    assert all(
        by_rows[name]
        for name in ("cast", "quantize rows", "quantize blocks", "multiply by rows", "nvfp4 values")
    )


def test_an_unknown_operation_lists_the_known_ones() -> None:
    with pytest.raises(PassError, match=r"unknown weight operation 'knit'\. Known: cast, transpose"):
        bind(Op("knit", {}), (2, 2), evaluate)
