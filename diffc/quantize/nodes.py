"""The ONNX nodes of a quantizer: standard pairs, and TensorRT's operators where block scales are found at run time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from passes.graph.trt_ops import DOMAIN, FOUR_OVER_SIX

_E4M3 = int(TensorProto.FLOAT8E4M3FN)


def quantize_linear(stored: int) -> Callable[[Any, Any, int | None, int], Any]:
    """QuantizeLinear to the element type `stored`, then DequantizeLinear; the zero point is zero."""

    def nodes(x: Any, scale: Any, axis: int | None, block_size: int) -> Any:
        from onnxscript import opset23 as op

        scale = _cast(scale, x.dtype)
        if block_size:
            blocks = {"axis": len(x.shape) - 1, "block_size": block_size}
            quantized = op.QuantizeLinear(x, scale, output_dtype=int(stored), **blocks)
            return op.DequantizeLinear(quantized, scale, **blocks)
        attributes = {} if axis is None else {"axis": axis}
        size = [] if axis is None else [int(scale.shape[0])]
        zeros = np.zeros(size, onnx.helper.tensor_dtype_to_np_dtype(stored))
        zero_point = op.Constant(value=onnx.numpy_helper.from_array(zeros, "zero_point"))
        quantized = op.QuantizeLinear(x, scale, zero_point, **attributes)
        return op.DequantizeLinear(quantized, scale, zero_point, **attributes)

    return nodes


def nvfp4(x: Any, scale: Any, axis: int | None, block_size: int) -> Any:
    """E2M1 values and E4M3 block scales; a block scale times the tensor's is in float32, and so is the result."""
    return _nvfp4(x, scale, axis, block_size)


def four_six(x: Any, scale: Any, axis: int | None, block_size: int) -> Any:
    """The same with the largest of a block at 6 or at 4, of a weight: the pass fold-weight-qdq computes it."""
    return _nvfp4(x, scale, axis, block_size, **{FOUR_OVER_SIX: 1})


def _nvfp4(x: Any, scale: Any, axis: int | None, block_size: int, **more: int) -> Any:
    import onnx_ir as ir
    from onnxscript import opset23 as op

    del axis
    types, more = (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN), {"scale_type": _E4M3, **more}
    values, scales = _trt("TRT_FP4DynamicQuantize", [x, scale], types, x.shape, block_size, **more)
    block_scale = op.DequantizeLinear(scales, scale)
    out = op.DequantizeLinear(values, block_scale, axis=-1, block_size=block_size)
    return out if x.dtype == ir.DataType.FLOAT else op.Cast(out, to=int(x.dtype))


def mxfp8(x: Any, scale: Any, axis: int | None, block_size: int) -> Any:
    """E4M3 values and power-of-two block scales, which TensorRT's parser takes as UINT8 (the exponent + 127)."""
    import onnx_ir as ir

    del scale, axis
    types = (ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8)
    made = _trt("TRT_MXFP8DynamicQuantize", [x], types, x.shape, block_size, output_dtype=_E4M3)
    dtype = {"output_dtype": int(x.dtype)}
    (out,) = _trt("TRT_MXFP8DequantizeLinear", list(made), (x.dtype,), x.shape, block_size, **dtype)
    return out


def _cast(x: Any, dtype: Any) -> Any:
    """x in that type, with its shape: the exporter notes both of what torch casts only."""
    from onnxscript import opset23 as op

    if x.dtype == dtype:
        return x
    out = op.Cast(x, to=int(dtype))
    out.dtype, out.shape = dtype, x.shape
    return out


def _trt(
    name: str, inputs: list[Any], types: tuple[Any, ...], shape: Any, block_size: int, **attributes: int
) -> tuple[Any, ...]:
    """A node of TensorRT's domain with typed outputs: the first of `shape`, a second one of its blocks."""
    import onnx_ir as ir
    from onnxscript import evaluator

    blocks = ir.Shape([*shape[:-1], int(shape[-1]) // block_size])
    node = ir.node(
        name,
        inputs,
        {"axis": -1, "block_size": block_size, **attributes},
        domain=DOMAIN,
        num_outputs=len(types),
    )
    for value, dtype, dims in zip(node.outputs, types, (ir.Shape(shape), blocks), strict=False):
        value.dtype, value.shape = dtype, dims
    recorder: Any = evaluator.default()  # the exporter's, while it calls translations
    recorder.nodes.append(node)
    return tuple(node.outputs)
