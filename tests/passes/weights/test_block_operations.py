"""Stored weights of the block formats: recipes against the simulation of ModelOpt, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from onnx import TensorProto

from diffc.quantize.formats import INT4_BLOCK
from diffc.quantize.simulate import (
    four_six_fake_quant,
    mxfp8_fake_quant,
    nvfp4_fake_quant,
    nvfp4_round_trip,
)
from diffc.quantize.state import portable
from passes.base import PassError
from passes.weights.block_operations import BLOCK_KERNELS
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from passes.weights.sources import keep

TORCH = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float16): torch.float16,
    np.dtype(ml_dtypes.bfloat16): torch.bfloat16,
}
dtypes = pytest.mark.parametrize("dtype", TORCH, ids=str)


def weight(dtype: Any, seed: int, shape: tuple[int, int] = (40, 256)) -> npt.NDArray[Any]:
    """Normal values with outliers, of rows that differ by powers of two; blocks of zeros, and one of tiny values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-6, 4, (shape[0], 1)))
    x *= np.where(rng.random(shape) < 0.01, 20, 1)
    x[3, :64], x[5, 32:64], x[7, 64:128] = 0, -0.0, 1e-7
    x[9, ::2] = rng.integers(-6, 7, shape[1] // 2)
    return np.asarray(x).astype(dtype)


def tensor_of(x: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).to(TORCH[x.dtype])  # exact: x has that type


def assert_same(ours: npt.NDArray[Any], theirs: torch.Tensor) -> None:
    """To the last bit, in the type that both have."""
    wide = torch.from_numpy(ours.astype(np.float32)).to(theirs.dtype)
    differ = (wide.float() != theirs.float()).sum()
    assert differ == 0, f"{differ} of {theirs.numel()} values differ"


@dtypes
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shrunk", [1.0, 0.5])
def test_nvfp4_recipes_are_the_simulation(dtype: Any, seed: int, shrunk: float) -> None:
    """`shrunk`: with half the amax, so that large blocks saturate their scale and their values."""
    x = weight(dtype, seed)
    amax = torch.tensor(float(np.abs(x.astype(np.float32)).max()) * shrunk)
    s2 = (amax * (1.0 / 2688)).numpy()
    scale, recipe = Recipe.of_array(np.asarray(s2)), keep(x)
    values, scales = recipe.nvfp4_values(scale), recipe.nvfp4_scales(scale)
    assert (values.dtype, values.shape) == (TensorProto.FLOAT4E2M1, (40, 256))
    assert (scales.dtype, scales.shape) == (TensorProto.FLOAT8E4M3FN, (40, 16))
    assert (values.nbytes, scales.nbytes) == (40 * 128, 40 * 16)
    steps = evaluate(scales).astype(np.float32) * s2
    ours = evaluate(values).astype(np.float32) * np.repeat(steps, 16, axis=1)
    assert_same(ours, nvfp4_fake_quant(tensor_of(x), amax))
    assert_same(ours, nvfp4_round_trip(tensor_of(x), torch.from_numpy(np.asarray(s2))))
    error = np.linalg.norm(ours - x.astype(np.float32)) / np.linalg.norm(x.astype(np.float32))
    assert 0.02 < error < (0.2 if shrunk == 1 else 0.6)


@dtypes
@pytest.mark.parametrize("shrunk", [1.0, 0.5])
def test_four_over_six_recipes_are_the_simulation_and_lose_less_in_every_block(
    dtype: Any, shrunk: float
) -> None:
    x = weight(dtype, 1)
    amax = torch.tensor(float(np.abs(x.astype(np.float32)).max()) * shrunk)
    scale, recipe = Recipe.of_array((amax * (1.0 / 1536)).numpy()), keep(x)
    values, scales = recipe.nvfp4_values(scale, four_six=True), recipe.nvfp4_scales(scale, four_six=True)
    steps = evaluate(scales).astype(np.float32) * evaluate(scale)
    ours = evaluate(values).astype(np.float32) * np.repeat(steps, 16, axis=1)
    assert_same(ours, four_six_fake_quant(tensor_of(x), amax))
    six = evaluate(recipe.nvfp4_values(scale)).astype(np.float32)
    six *= np.repeat(evaluate(recipe.nvfp4_scales(scale)).astype(np.float32) * evaluate(scale), 16, axis=1)
    errors = [np.square(one - x.astype(np.float64)).reshape(-1, 16).sum(1) for one in (ours, six)]
    assert (errors[0] <= errors[1]).all()
    assert 0.3 < np.mean(errors[0] < errors[1]) < 0.7  # both ways are taken


@dtypes
@pytest.mark.parametrize("seed", range(3))
def test_mxfp8_recipes_are_the_simulation(dtype: Any, seed: int) -> None:
    x = weight(dtype, seed)
    recipe = keep(x)
    values, scales = recipe.mxfp8_values(), recipe.mxfp8_scales()
    assert (values.dtype, values.shape) == (TensorProto.FLOAT8E4M3FN, (40, 256))
    assert (scales.dtype, scales.shape) == (TensorProto.UINT8, (40, 8))
    exponents = evaluate(scales).astype(np.int32) - 127
    assert exponents[3, 0] == exponents[5, 1] == 0  # of zeros
    ours = np.ldexp(evaluate(values).astype(np.float32), np.repeat(exponents, 32, axis=1))
    assert_same(ours, mxfp8_fake_quant(tensor_of(x)))
    error = np.linalg.norm(ours - x.astype(np.float32)) / np.linalg.norm(x.astype(np.float32))
    assert 0.005 < error < 0.05


@dtypes
@pytest.mark.parametrize("block", [32, 128])
def test_int4_recipes_are_modelopts(dtype: Any, block: int) -> None:
    x = weight(dtype, 8)
    blocks = {**INT4_BLOCK, "block_sizes": {-1: block, "type": "static"}}
    quantizer: Any = TensorQuantizer(QuantizerAttributeConfig(**blocks))
    amax = np.abs(x.astype(np.float32).reshape(40, -1, block)).max(-1)
    amax = portable(torch.from_numpy(np.where(amax > 0, amax, 1.0)), 7.0)
    quantizer.amax = amax.reshape(-1, 1)
    theirs = quantizer(tensor_of(x).float())
    scale = keep(amax.numpy()).scale_of_amax(7.0)
    recipe = keep(x).quantize(scale, TensorProto.INT4, axis=1, block_size=block)
    codes = evaluate(recipe).astype(np.float32)
    assert -8 <= codes.min() <= -7
    assert codes.max() == 7
    steps = np.repeat(amax.numpy() / np.float32(7), block, axis=1)
    # ModelOpt divides by its factor 7 / amax, so that its values are codes x scale to the last bits.
    np.testing.assert_array_max_ulp(codes * steps, theirs.numpy(), maxulp=2)
    assert np.array_equal(codes, np.rint(theirs.numpy() / steps))
    back = evaluate(recipe.dequantize(scale, 1, block))
    assert np.array_equal(back, codes * steps)


def test_blocks_that_are_not_whole_are_refused() -> None:
    recipe = keep(weight(np.float32, 1, (12, 264)))
    for make in (recipe.mxfp8_scales, lambda: recipe.nvfp4_scales(Recipe.of_array(np.float32(1)))):
        with pytest.raises(PassError, match=r"\(12, 264\) has no whole blocks of"):
            make()


def test_recipes_survive_json() -> None:
    x = keep(weight(np.float16, 2))
    scale = Recipe.of_array(np.asarray(np.float32(0.01)))
    for recipe in (x.nvfp4_values(scale), x.nvfp4_scales(scale), x.mxfp8_values(), x.mxfp8_scales()):
        again = Recipe.of_tensor(recipe.to_tensor("w"))
        assert again == recipe
        assert np.array_equal(evaluate(again).view(np.uint8), evaluate(recipe).view(np.uint8))


@dtypes
def test_a_product_is_subtracted_before_rounding(dtype: Any) -> None:
    rng = np.random.default_rng(5)
    x, left, right = weight(dtype, 5), rng.standard_normal((40, 8)), rng.standard_normal((8, 256))
    left, right = left.astype(np.float32), right.astype(np.float32)
    recipe = keep(x).subtract_product(keep(left), keep(right))
    exact = x.astype(np.float64) - left.astype(np.float64) @ right.astype(np.float64)
    found = evaluate(recipe)
    assert found.dtype == x.dtype
    assert np.array_equal(found.astype(np.float64), exact.astype(np.float32).astype(dtype).astype(np.float64))
    torch_way = tensor_of(x).double() - torch.from_numpy(left).double() @ torch.from_numpy(right).double()
    assert_same(found, torch_way.float().to(TORCH[np.dtype(dtype)]))


@pytest.mark.parametrize("name", ["nvfp4_scales", "nvfp4_values", "mxfp8_values"])
def test_the_comparison_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, *others = BLOCK_KERNELS[name]
    wrong = lambda x, **args: right((x * 1.1).astype(x.dtype), **args)  # noqa: E731
    monkeypatch.setitem(BLOCK_KERNELS, name, (wrong, *others))
    check = (
        test_nvfp4_recipes_are_the_simulation if "nvfp4" in name else test_mxfp8_recipes_are_the_simulation
    )
    with pytest.raises(AssertionError, match="values differ"):
        check(np.dtype(np.float32), 0, **({"shrunk": 1.0} if "nvfp4" in name else {}))


@pytest.mark.parametrize("rows", [1, 1500])
def test_one_row_and_many(rows: int) -> None:
    """Recipes are computed some rows at a time."""
    x = weight(np.float16, 4, (max(rows, 40), 256))[-rows:]
    scale = Recipe.of_array(np.float32(np.abs(x).max()) * np.float32(1 / 2688))
    steps = evaluate(keep(x).nvfp4_scales(scale)).astype(np.float32) * evaluate(scale)
    ours = evaluate(keep(x).nvfp4_values(scale)).astype(np.float32) * np.repeat(steps, 16, axis=1)
    assert_same(ours, nvfp4_fake_quant(tensor_of(x), tensor_of(x).abs().max()))
