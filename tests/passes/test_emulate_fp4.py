from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graph_helpers import apply, check_same, error, materialize, model, recipes, run_ort, run_reference
from onnx import TensorProto
from trt_helpers import E2M1_GRID, mxfp8, nvfp4, trt_model

from passes import PassError, Pipeline
from passes.add_functions import AddTrtFunctions
from passes.emulate_fp4 import EmulateFp4
from passes.fold_weight_qdq import FoldWeightQdq
from passes.remove_unused import RemoveUnused
from passes.type_trt_ops import TypeTrtOps
from passes.weights import Recipe

RNG = np.random.default_rng(11)
FP4 = ml_dtypes.float4_e2m1fn
N, K = 24, 64
EMULATION = (TypeTrtOps(), EmulateFp4(), AddTrtFunctions())


def nvfp4_network(weight: np.ndarray, amax_x: float, amax_w: float) -> onnx.ModelProto:
    """MatMul of NVFP4 activations and weights as it is traced: the weight has the dynamic quantizer, too."""
    attributes = "axis = -1, block_size = 16, scale_type = 17"
    return trt_model(
        f"""g (float16[b,t,{K}] x) => (float[b,t,{N}] y) {{
            xq, xb = trt.TRT_FP4DynamicQuantize<{attributes}>(x, xs)
            xw = DequantizeLinear(xb, xs)
            xd = DequantizeLinear<axis = -1, block_size = 16>(xq, xw)
            xh = Cast<to = 10>(xd)
            wq, wb = trt.TRT_FP4DynamicQuantize<{attributes}>(w, ws)
            ww = DequantizeLinear(wb, ws)
            wd = DequantizeLinear<axis = -1, block_size = 16>(wq, ww)
            wt = Transpose<perm = [1, 0]>(wd)
            wh = Cast<to = 10>(wt)
            xf = Cast<to = 1>(xh)
            wf = Cast<to = 1>(wh)
            y = MatMul(xf, wf)
        }}""",
        {
            "w": Recipe.of_array(weight),
            "xs": np.array(amax_x / 2688, np.float32),
            "ws": np.array(amax_w / 2688, np.float32),
        },
    )


def mxfp8_network(weight: np.ndarray) -> onnx.ModelProto:
    quantize = "trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>"
    dequantize = "trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = 10>"
    return trt_model(
        f"""g (float16[b,t,{K}] x) => (float[b,t,{N}] y) {{
            xq, xs = {quantize}(x)
            xd = {dequantize}(xq, xs)
            wq, ws = {quantize}(w)
            wd = {dequantize}(wq, ws)
            wt = Transpose<perm = [1, 0]>(wd)
            xf = Cast<to = 1>(xd)
            wf = Cast<to = 1>(wt)
            y = MatMul(xf, wf)
        }}""",
        {"w": Recipe.of_array(weight)},
    )


def sample() -> tuple[np.ndarray, np.ndarray]:
    """Activations [2, 5, K] and a weight [N, K] in float16, of rows with different scales."""
    x = RNG.standard_normal((2, 5, K)) * np.exp2(RNG.integers(-3, 4, (2, 5, 1)))
    w = RNG.standard_normal((N, K)) * np.exp2(RNG.integers(-6, 1, (N, 1)))
    return x.astype(np.float16), w.astype(np.float16)


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x [..., K] times w [N, K] transposed; both are rounded to float16 first."""
    left, right = (value.astype(np.float32).astype(np.float16).astype(np.float64) for value in (x, w))
    return (left @ right.T).astype(np.float32)


def nvfp4_simulated(x: np.ndarray, s2: float) -> np.ndarray:
    values, scales = nvfp4(x, s2)
    return values * np.repeat((scales * np.float32(s2)).astype(np.float32), 16, -1)


def mxfp8_simulated(x: np.ndarray) -> np.ndarray:
    values, scales = mxfp8(x)
    return values * np.repeat(np.ldexp(1.0, scales - 127), 32, -1)


@pytest.mark.parametrize("folded", [False, True])
def test_an_nvfp4_network_runs_in_onnx_runtime(folded: bool) -> None:
    x, w = sample()
    amax_x, amax_w = float(np.abs(x).max()) * 0.8, float(np.abs(w).max())
    traced = nvfp4_network(w, amax_x, amax_w)
    if folded:
        traced = apply(traced, FoldWeightQdq(), RemoveUnused()).model
        assert {r.dtype for r in recipes(traced).values()} == {TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN}
    emulated = apply(traced, *EMULATION).model
    want = product(nvfp4_simulated(x, np.float32(amax_x / 2688)), nvfp4_simulated(w, np.float32(amax_w / 2688)))
    got = run_ort(emulated, {"x": x})[0]
    assert error(got, want) < 1e-6  # sums in another order
    assert error(run_reference(apply(traced, AddTrtFunctions()).model, {"x": x})[0], want) < 1e-6
    unquantized = product(x, w)
    assert 2e-2 < error(unquantized, want) < 0.2
    wrong = run_ort(emulated, {"x": x[:, ::-1]})[0]
    assert error(wrong, want) > 0.5


@pytest.mark.parametrize("folded", [False, True])
def test_an_mxfp8_network_runs_in_onnx_runtime(folded: bool) -> None:
    x, w = sample()
    traced = mxfp8_network(w)
    if folded:
        traced = apply(traced, FoldWeightQdq(), RemoveUnused()).model
        assert {r.dtype for r in recipes(traced).values()} == {TensorProto.UINT8, TensorProto.FLOAT8E4M3FN}
    emulated = apply(traced, *EMULATION).model
    want = product(mxfp8_simulated(x), mxfp8_simulated(w))
    assert error(run_ort(emulated, {"x": x})[0], want) < 1e-6
    assert error(run_reference(emulated, {"x": x})[0], want) < 1e-6
    assert 5e-3 < error(product(x, w), want) < 0.1
