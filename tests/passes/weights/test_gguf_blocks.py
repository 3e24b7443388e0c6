"""GGUF blocks against what the `gguf` package (0.19) makes of random bytes: `tests/data/gguf/blocks.npz`."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from passes.weights.evaluate import evaluate
from passes.weights.gguf_blocks import BLOCKS
from passes.weights.recipe import Recipe
from passes.weights.stored import of_gguf
from tests import ROOT

KEPT = np.load(ROOT / "tests/data/gguf/blocks.npz")


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_values_are_those_of_ggml_bit_for_bit(kind: str) -> None:
    raw, expected = KEPT[f"{kind}_raw"], KEPT[f"{kind}_values"]
    assert raw.shape[1] == BLOCKS[kind].nbytes
    assert expected.any()
    np.testing.assert_array_equal(BLOCKS[kind].values(raw).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_recipe_gives_rows_of_several_blocks(kind: str) -> None:
    raw, expected = KEPT[f"{kind}_raw"][:2], KEPT[f"{kind}_values"][:2]
    two_a_row = Recipe.of_array(np.stack([raw.reshape(-1), raw[::-1].reshape(-1)]))
    recipe = of_gguf(two_a_row, kind, 2 * BLOCKS[kind].elements)
    assert recipe.dtype == TensorProto.FLOAT
    wanted = np.stack([expected.reshape(-1), expected[::-1].reshape(-1)])
    np.testing.assert_array_equal(evaluate(recipe), wanted)


def test_q4_0_stays_codes() -> None:
    recipe = of_gguf(Recipe.of_array(KEPT["Q4_0_raw"]), "Q4_0", 32)
    assert [op.name for op in recipe.ops] == ["gguf_codes", "dequantize"]
