"""Translations of the quantizer operators to ONNX: standard pairs, and TensorRT's operators for dynamic blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

import diffc.frontend.quantizers  # noqa: F401  # registers the operators

TRT = "trt"
"""The domain of TensorRT's operators; version 1."""
_TYPES = {
    "int8": onnx.TensorProto.INT8,
    "int4": onnx.TensorProto.INT4,
    "fp8": onnx.TensorProto.FLOAT8E4M3FN,
}
_NVFP4_BLOCK, _MXFP8_BLOCK = 16, 32
_E4M3 = int(onnx.TensorProto.FLOAT8E4M3FN)


def quantizer_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of torch.onnx.export's `custom_translation_table`."""
    return {
        torch.ops.diffc.quantize_dequantize.default: _static,
        torch.ops.diffc.block_quantize_dequantize.default: _dynamic,
    }


def _static(x: Any, scale: Any, kind: str, axis: int | None, block_size: int) -> Any:
    from onnxscript import opset23 as op

    scale = _cast(scale, x.dtype)
    attributes: dict[str, int] = {} if axis is None else {"axis": axis}
    if block_size:
        attributes = {"axis": len(x.shape) - 1, "block_size": block_size}
        quantized = op.QuantizeLinear(x, scale, output_dtype=int(_TYPES[kind]), **attributes)
        return op.DequantizeLinear(quantized, scale, **attributes)
    size = [] if axis is None else [int(scale.shape[0])]
    zeros = np.zeros(size, onnx.helper.tensor_dtype_to_np_dtype(_TYPES[kind]))
    zero_point = op.Constant(value=onnx.numpy_helper.from_array(zeros, "zero_point"))
    quantized = op.QuantizeLinear(x, scale, zero_point, **attributes)
    return op.DequantizeLinear(quantized, scale, zero_point, **attributes)


def _cast(x: Any, dtype: Any) -> Any:
    """x in that type, with its shape: the exporter notes both of what torch casts only."""
    from onnxscript import opset23 as op

    if x.dtype == dtype:
        return x
    out = op.Cast(x, to=int(dtype))
    out.dtype, out.shape = dtype, x.shape
    return out


def _dynamic(x: Any, scale: Any, kind: str) -> Any:
    return _nvfp4(x, scale) if kind == "nvfp4" else _mxfp8(x)


def _nvfp4(x: Any, scale: Any) -> Any:
    """E2M1 values and E4M3 block scales; the block scale times the tensor's is in float32, and so is the result."""
    from onnxscript import opset23 as op

    types = (ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN)
    values, scales = _trt(
        "TRT_FP4DynamicQuantize", [x, scale], types, x.shape, _NVFP4_BLOCK, scale_type=_E4M3
    )
    block_scale = op.DequantizeLinear(scales, scale)
    out = op.DequantizeLinear(values, block_scale, axis=-1, block_size=_NVFP4_BLOCK)
    return out if x.dtype == ir.DataType.FLOAT else op.Cast(out, to=int(x.dtype))


def _mxfp8(x: Any) -> Any:
    """E4M3 values and power-of-two block scales, which TensorRT's parser takes as UINT8 (the exponent + 127)."""
    types = (ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT8)
    values, scales = _trt("TRT_MXFP8DynamicQuantize", [x], types, x.shape, _MXFP8_BLOCK, output_dtype=_E4M3)
    (out,) = _trt(
        "TRT_MXFP8DequantizeLinear",
        [values, scales],
        (x.dtype,),
        x.shape,
        _MXFP8_BLOCK,
        output_dtype=int(x.dtype),
    )
    return out


def _trt(
    name: str, inputs: list[Any], types: tuple[Any, ...], shape: Any, block_size: int, **attributes: int
) -> tuple[Any, ...]:
    """A node of TensorRT's domain with typed outputs: the first of `shape`, a second one of its blocks."""
    from onnxscript import evaluator

    blocks = ir.Shape([*shape[:-1], int(shape[-1]) // block_size])
    node = ir.node(
        name,
        inputs,
        {"axis": -1, "block_size": block_size, **attributes},
        domain=TRT,
        num_outputs=len(types),
    )
    for value, dtype, dims in zip(node.outputs, types, (ir.Shape(shape), blocks), strict=False):
        value.dtype, value.shape = dtype, dims
    recorder: Any = evaluator.default()  # the exporter's, while it calls translations
    recorder.nodes.append(node)
    return tuple(node.outputs)
