"""Tensors without data: what converters do to them, as recipes that give what torch gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffc.errors import DiffcError
from diffc.models.single.stand_ins import recipe_of, stand_in
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

VALUES = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)


def swapped(x: Any) -> Any:
    first, second = x.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


MOVES = {
    "chunk": lambda x: torch.chunk(x, 3, dim=0)[1],
    "split": lambda x: torch.split(x, (3, 4, 5), dim=0)[2],
    "halves swapped": swapped,
    "transpose": lambda x: x.T,
    "transpose, made whole": lambda x: x.transpose(0, 1).contiguous(),
    "columns": lambda x: x[:, 2:5],
    "one row": lambda x: x[3],
    "the last row": lambda x: x[-1],
    "every other row": lambda x: x[::2],
    "interleaved": lambda x: x.reshape(3, 4, 8).permute(1, 0, 2).reshape(12, 8),
    "axes of one": lambda x: x.unsqueeze(-1).squeeze(),
    "joined columns": lambda x: torch.cat([x, x[:, :2]], dim=1),
    "stacked": lambda x: torch.stack([x[:4], x[4:8]]),
    "unbound": lambda x: x.unbind(0)[2],
    "cloned": lambda x: x.clone().detach(),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_move_gives_the_recipe_of_what_torch_gives(name: str) -> None:
    wanted = MOVES[name](torch.from_numpy(VALUES))
    made = MOVES[name](stand_in(Recipe.of_array(VALUES), "key"))
    recipe, keys = recipe_of(made)
    assert keys == {"key"}
    assert tuple(made.shape) == recipe.shape == tuple(wanted.shape)
    np.testing.assert_array_equal(evaluate(recipe), wanted.numpy())


def test_keys_of_joined_tensors_are_all_told() -> None:
    one, other = (stand_in(Recipe.of_array(VALUES), key) for key in "ab")
    assert recipe_of(torch.cat([one, other]))[1] == {"a", "b"}


def test_sizes_of_another_width_are_taken_in_proportion() -> None:
    parts = torch.split(stand_in(Recipe.of_array(VALUES), "key"), (3072, 3072, 6144), dim=0)
    assert [tuple(part.shape) for part in parts] == [(3, 8), (3, 8), (6, 8)]


def test_sizes_of_no_proportion_are_refused() -> None:
    with pytest.raises(DiffcError, match="cannot be split"):
        torch.split(stand_in(Recipe.of_array(VALUES), "key"), (5, 6, 7), dim=0)


def test_arithmetic_is_refused() -> None:
    with pytest.raises(DiffcError, match="computes with weights"):
        stand_in(Recipe.of_array(VALUES), "key") * 2


def test_a_tensor_of_the_converters_own_is_refused() -> None:
    with pytest.raises(DiffcError, match="a tensor of its own"):
        recipe_of(torch.ones(2))
