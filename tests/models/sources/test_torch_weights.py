"""Weights as torch tensors: the bits of the file, in memory of their own, one at a time."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffc.models.sources.safetensors_files import file_weights
from diffc.models.sources.torch_weights import TorchWeights, fill_buffers
from diffc.tensors import tensor_of
from passes.weights.recipe import Recipe

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def stored(path: Path, dtype: torch.dtype) -> torch.Tensor:
    values = (torch.randn(7, 5, generator=torch.Generator().manual_seed(3)) * 9).to(dtype)
    save_file({"x": values, "scalar": values[0, 0].clone()}, path)
    return values


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = stored(tmp_path / "w", dtype)
    weights = file_weights(tmp_path / "w")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tensor_of(weights["x"])
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected.float())
    assert tensor_of(weights["scalar"]).shape == ()
    wide = tensor_of(weights["x"], torch.bfloat16)
    assert wide.dtype == torch.bfloat16
    assert torch.equal(wide, expected.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = stored(tmp_path / "w", dtype)
    recipe = file_weights(tmp_path / "w")["x"]
    tensor_of(recipe).zero_()
    tensor_of(recipe, dtype).zero_()
    TorchWeights({"x": recipe})["x"].zero_()
    assert torch.equal(tensor_of(recipe), expected)


def test_recipes_are_computed_and_rounded(tmp_path: Path) -> None:
    expected = stored(tmp_path / "w", torch.float32)
    recipe = file_weights(tmp_path / "w")["x"].multiply(Recipe.of_array(np.float32([[3.0]])))
    weights = TorchWeights({"x": recipe}, torch.bfloat16)
    assert (list(weights), len(weights)) == (["x"], 1)
    assert weights["x"].dtype == torch.float32
    assert torch.equal(weights["x"], (expected * 3).to(torch.bfloat16).float())


def test_buffers_are_filled_from_the_weights_or_rounded_as_they_are() -> None:
    model = torch.nn.Module()
    generator = torch.Generator().manual_seed(1)
    given, own = torch.randn(4, generator=generator), torch.randn(4, generator=generator)
    model.register_buffer("given", torch.zeros(4))
    model.register_buffer("own", own.clone())
    model.register_buffer("whole", torch.arange(4))
    fill_buffers(model, {"given": given}, torch.bfloat16)
    assert torch.equal(model.get_buffer("given"), given.to(torch.bfloat16).float())
    assert torch.equal(model.get_buffer("own"), own.to(torch.bfloat16).float())
    assert torch.equal(model.get_buffer("whole"), torch.arange(4))
