"""ModelOpt quantizers as a custom operator, so that torch.export sees one node where ModelOpt has checks.

`TensorQuantizer.forward` cannot be exported (it branches on data). For the time of a trace it is replaced by
`diffc::quantize_dequantize`, whose translation is the ONNX pair QuantizeLinear, DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx
import torch

# The largest magnitude of each quantized type: scale = amax / bound (ModelOpt, tensor_quant.py).
BOUNDS = {"int8": 127.0, "fp8": 448.0}
ONNX_TYPES = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


@torch.library.custom_op("diffc::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None) -> torch.Tensor:
    """ONNX QuantizeLinear then DequantizeLinear with a zero zero point, in float32; result in x's dtype.

    `scale` is a scalar, or of shape [x.shape[axis]]. `kind` is "int8" or "fp8" (E4M3FN).
    """
    shape = [-1 if axis is not None and i == axis % x.dim() else 1 for i in range(x.dim())]
    s = scale.float().reshape(shape) if axis is not None else scale.float()
    scaled = x.float() / s
    if kind == "int8":
        steps = scaled.round().clamp(-128, 127)
    else:
        steps = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return (steps * s).to(x.dtype)


@quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None) -> torch.Tensor:
    del scale, kind, axis
    return torch.empty_like(x)


def _translate(x: Any, scale: Any, kind: str, axis: int | None) -> Any:
    from onnxscript import opset23 as op

    size = [] if axis is None else [int(scale.shape[0])]
    zeros = onnx.helper.make_tensor(
        "zero_point", ONNX_TYPES[kind], size, bytes(size[0] if size else 1), raw=True
    )
    zero_point = op.Constant(value=zeros)
    attributes = {} if axis is None else {"axis": axis}
    quantized = op.QuantizeLinear(x, scale, zero_point, **attributes)
    return op.DequantizeLinear(quantized, scale, zero_point, **attributes)


def quantizer_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of torch.onnx.export's `custom_translation_table`."""
    return {torch.ops.diffc.quantize_dequantize.default: _translate}


@dataclass(frozen=True)
class TracedQuantizer:
    """What a trace keeps of one quantizer: its kind, the channel axis (None: per tensor), and its bound."""

    kind: str
    axis: int | None

    @property
    def bound(self) -> float:
        """Largest magnitude of the quantized type."""
        return BOUNDS[self.kind]


def describe(quantizer: Any) -> TracedQuantizer:
    """Kind and axis of a ModelOpt TensorQuantizer. Raises TypeError for a kind that has no translation."""
    bits, axis = quantizer.num_bits, quantizer.axis
    kind = {8: "int8", (4, 3): "fp8"}.get(bits if isinstance(bits, int) else tuple(bits))
    if kind is None or quantizer.block_sizes:
        raise TypeError(f"no ONNX translation for a quantizer of {bits} bits, blocks {quantizer.block_sizes}")
    return TracedQuantizer(kind, axis[0] if isinstance(axis, tuple) else axis)


@contextmanager
def traceable(
    quantizers: dict[str, Any], sizes: dict[str, int | None]
) -> Iterator[dict[str, TracedQuantizer]]:
    """Make these quantizers (by module path) exportable; yields what each one is.

    Each gets a buffer `scale`: a scalar where `sizes` says None, else of that many channels. Its values are
    never read by the trace. Quantizers that are not listed pass their input through.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    traced = {name: describe(quantizer) for name, quantizer in quantizers.items()}
    for name, quantizer in quantizers.items():
        size = sizes[name]
        quantizer.register_buffer("scale", torch.ones(() if size is None else (size,)))
        quantizer.diffc_traced = traced[name]

    def forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        kind = getattr(self, "diffc_traced", None)
        if kind is None:
            return inputs
        out: torch.Tensor = quantize_dequantize(inputs, self.scale.to(inputs.dtype), kind.kind, kind.axis)
        return out

    original = TensorQuantizer.forward
    TensorQuantizer.forward = forward
    try:
        yield traced
    finally:
        TensorQuantizer.forward = original
