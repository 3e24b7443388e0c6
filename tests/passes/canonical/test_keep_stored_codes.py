"""keep-stored-codes: the dequantization of a weight is in the graph, and its codes are stored."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from passes.canonical.keep_stored_codes import KeepStoredCodes
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe
from passes.weights.stored import power_of_two
from tests.passes.graph_helpers import apply, check_same, model, ops, recipes

RNG = np.random.default_rng(9)
N, K = 6, 64
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def array(values: Any, dtype: Any = np.float32) -> Recipe:
    return Recipe.of_array(np.ascontiguousarray(np.asarray(values).astype(dtype)))


def codes(dtype: Any = E4M3) -> Recipe:
    return array(RNG.normal(size=(N, K)) * 3, dtype)


def product(weight: Recipe, wide: str = "float") -> onnx.ModelProto:
    """y = x w for a weight [K, N] in the type `wide`."""
    return model(f"g ({wide}[b,{K}] x) => ({wide}[b,{N}] y) {{ y = MatMul(x, w) }}", {"w": weight})


def inputs(dtype: Any = np.float32) -> dict[str, Any]:
    return {"x": RNG.normal(size=(3, K)).astype(dtype)}


@pytest.mark.parametrize("kind", ["tensor", "rows", "blocks"])
def test_codes_are_stored_in_the_layout_of_the_reader(kind: str) -> None:
    if kind == "tensor":
        weight = codes().dequantize(array(0.03))
    elif kind == "rows":
        weight = codes(np.int8).dequantize(array(RNG.uniform(0.1, 1, N)), 0)
    else:
        weight = codes(ml_dtypes.int4).dequantize(array(RNG.uniform(0.1, 1, (N, 2))), 1, 32)
    before = product(weight.transpose((1, 0)))
    result = apply(before, KeepStoredCodes())
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    stored = recipes(result.model)["w_q"]
    assert stored.shape == (K, N)
    np.testing.assert_array_equal(
        evaluate(stored).astype(np.float32), evaluate(Recipe.of_source(weight.source)).astype(np.float32).T
    )
    check_same(before, result.model, inputs())


def test_a_16_bit_weight_is_cast_after_its_float32_scale() -> None:
    weight = codes().dequantize(array(0.037)).cast(TensorProto.FLOAT16).transpose((1, 0))
    before = product(weight, "float16")
    result = apply(before, KeepStoredCodes())
    assert ops(result.model) == ["DequantizeLinear", "Cast", "MatMul"]
    assert recipes(result.model)["w_scale"].dtype == TensorProto.FLOAT
    check_same(before, result.model, inputs(np.float16), 1e-3)


def test_blocks_with_scales_of_scales_stay_along_the_last_axis() -> None:
    scales = array(RNG.uniform(1, 100, (N, K // 16)), E4M3).dequantize(array(0.01))
    before = product(codes(E2M1).dequantize(scales, 1, 16).transpose((1, 0)))
    result = apply(before, KeepStoredCodes())
    assert ops(result.model) == ["DequantizeLinear", "DequantizeLinear", "Transpose", "MatMul"]
    assert recipes(result.model)["w_q"].dtype == TensorProto.FLOAT4E2M1
    assert recipes(result.model)["w_q"].shape == (N, K)


def test_powers_of_two_are_for_tensorrt() -> None:
    scales = power_of_two(array(RNG.integers(120, 130, (N, K // 32)), np.uint8))
    before = product(codes().dequantize(scales, 1, 32).transpose((1, 0)))
    result = apply(before, KeepStoredCodes())
    assert ops(result.model) == ["TRT_MXFP8DequantizeLinear", "Transpose", "MatMul"]
    assert recipes(result.model)["w_scale"].dtype == TensorProto.UINT8


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (codes().dequantize(array(0.03)).multiply(array(RNG.uniform(1, 2, (1, K)))), "changed once more"),
        (array(RNG.integers(0, 9, (N, K)), np.int32).dequantize(array(0.03)), "its codes are INT32"),
    ],
)
def test_what_is_no_code_any_more_stays_a_weight(weight: Recipe, why: str) -> None:
    result = apply(product(weight.transpose((1, 0))), KeepStoredCodes())
    assert ops(result.model) == ["MatMul"]
    assert why in result.records[0].refusals[0].reason


def test_plain_weights_are_left_alone() -> None:
    result = apply(product(array(RNG.normal(size=(K, N)))), KeepStoredCodes())
    assert ops(result.model) == ["MatMul"]
    assert not result.records[0].refusals
