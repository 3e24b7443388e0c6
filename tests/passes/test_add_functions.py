from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from graph_helpers import apply, run_ort, run_reference
from trt_helpers import E4M3_GRID, hard_inputs, mxfp8, nvfp4, round_to, trt_model

from passes import PassError, Pipeline
from passes.add_functions import AddTrtFunctions
from passes.block_kernels import mxfp8_scales, mxfp8_values, nvfp4_scales, nvfp4_values
from passes.emulate_fp4 import EmulateFp4
from passes.trt_functions import BODIES
from passes.trt_ops import TRT_OPS

NAMES = {np.float32: "float", np.float16: "float16", ml_dtypes.bfloat16: "bfloat16"}
RUNNERS = {"ort": run_ort, "reference": run_reference}
Runner = Callable[[onnx.ModelProto, Any], list[Any]]


def cast_in(dtype: Any) -> str:
    """ONNX text: `x` of `dtype` from the float32 input `wide` (ONNX Runtime's Python has no bfloat16 inputs)."""
    return f"x = Cast<to = {onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))}>(wide)"


def nvfp4_model(dtype: Any = np.float32) -> onnx.ModelProto:
    return trt_model(
        f"""g (float[n,k] wide, float s2) => (float[n,k] values, float[n,j] scales)
        <float4e2m1[n,k] q, float8e4m3fn[n,j] s> {{
            {cast_in(dtype)}
            q, s = trt.TRT_FP4DynamicQuantize<axis = -1, block_size = 16, scale_type = 17>(x, s2)
            values = Cast<to = 1>(q)
            scales = Cast<to = 1>(s)
        }}"""
    )


def mxfp8_model(dtype: Any = np.float32) -> onnx.ModelProto:
    onnx_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return trt_model(
        f"""g (float[n,k] wide) => (float[n,k] back, float[n,k] values, uint8[n,j] scales)
        <float8e4m3fn[n,k] q> {{
            {cast_in(dtype)}
            q, scales = trt.TRT_MXFP8DynamicQuantize<axis = -1, block_size = 32, output_dtype = 17>(x)
            y = trt.TRT_MXFP8DequantizeLinear<axis = -1, block_size = 32, output_dtype = {onnx_type}>(q, scales)
            values = Cast<to = 1>(q)
            back = Cast<to = 1>(y)
        }}"""
    )


def with_functions(made: onnx.ModelProto, runner: Runner) -> onnx.ModelProto:
    steps = (EmulateFp4(), AddTrtFunctions()) if runner is run_ort else (AddTrtFunctions(),)
    return apply(made, *steps).model


def same_bits(got: Any, want: Any) -> bool:
    """Equal as numbers and in the signs of zeros."""
    got, want = (np.asarray(value).astype(np.float64) for value in (got, want))
    return np.array_equal(got.view(np.int64), want.view(np.int64))


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_nvfp4_is_the_definition_bit_for_bit(dtype: Any, runner: Runner) -> None:
    made = with_functions(nvfp4_model(dtype), runner)
    for name, x in hard_inputs(1, dtype).items():
        amax = float(np.abs(x.astype(np.float32)).max())
        for part in (1.0, 0.37, 1e-3):  # below 1 the tensor's scale is too small and blocks saturate
            s2 = np.array(max(amax * part / 2688, 1e-30), np.float32)
            values, scales = runner(made, {"wide": x.astype(np.float32), "s2": s2})
            want_values, want_scales = nvfp4(x, float(s2))
            assert same_bits(scales, want_scales), (name, part)
            assert same_bits(values, want_values), (name, part)
            assert same_bits(scales, nvfp4_scales(x, s2, 16)), (name, part)
            assert same_bits(values, nvfp4_values(x, s2, 16)), (name, part)


@pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_mxfp8_is_the_definition_bit_for_bit(dtype: Any, runner: Runner) -> None:
    made = with_functions(mxfp8_model(dtype), runner)
    for name, x in hard_inputs(2, dtype).items():
        back, values, scales = runner(made, {"wide": x.astype(np.float32)})
        want_values, want_scales = mxfp8(x)
        assert np.array_equal(scales, want_scales), name
        assert same_bits(values, want_values), name
        assert np.array_equal(scales, mxfp8_scales(x, 32)), name
        assert same_bits(values, mxfp8_values(x, 32)), name
        factors = np.repeat(np.ldexp(np.float32(1), want_scales - 127), 32, -1).astype(np.float32)
        with np.errstate(over="ignore"):
            want = (want_values.astype(np.float32) * factors).astype(dtype)
        assert same_bits(back, want.astype(np.float32)), name
