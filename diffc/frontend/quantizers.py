"""ModelOpt quantizers as custom operators, so that torch.export sees one node where ModelOpt has checks.

`TensorQuantizer.forward` cannot be exported (it branches on data). For the time of a trace it is replaced by one
of two operators: `diffc::quantize_dequantize`, whose translation is the ONNX pair QuantizeLinear,
DequantizeLinear, and `diffc::block_quantize_dequantize` for the formats whose block scales are found at run time,
which ONNX has no operator for and TensorRT has (`TRT_FP4DynamicQuantize`, `TRT_MXFP8DynamicQuantize`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffc.quantize.state import BOUNDS, Settings, block_size_of, kind_of


@torch.library.custom_op("diffc::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None, block_size: int
) -> torch.Tensor:
    """ONNX QuantizeLinear then DequantizeLinear with a zero zero point, in float32; result in x's dtype.

    `scale` is first rounded to that dtype, as both operators want it: a scalar, of shape [x.shape[axis]], or,
    with a `block_size` above 0, of the shape of x with the last axis divided by it. `kind` is "int8", "int4" or
    "fp8" (E4M3FN).
    """
    scaled = x.float() / (s := _spread(scale.to(x.dtype).float(), x, axis, block_size))
    if kind == "fp8":
        steps = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        steps = scaled.round().clamp(-BOUNDS[kind] - 1, BOUNDS[kind])
    return (steps * s).to(x.dtype)


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int | None, block_size: int) -> torch.Tensor:
    if block_size:
        return scale.repeat_interleave(block_size, -1)
    if axis is None:
        return scale
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None, block_size: int) -> torch.Tensor:
    del scale, kind, axis, block_size
    return torch.empty_like(x)


@torch.library.custom_op("diffc::block_quantize_dequantize", mutates_args=())
def block_quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Dynamic quantization in blocks of the last axis, and back: "nvfp4" or "mxfp8"; result in x's dtype.

    `scale` is the float32 scalar amax / (6 * 448) of NVFP4; MXFP8 has no use for it.
    """
    from diffc.quantize.simulate import mxfp8_fake_quant, nvfp4_round_trip

    return nvfp4_round_trip(x, scale) if kind == "nvfp4" else mxfp8_fake_quant(x)


@block_quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    del scale, kind
    return torch.empty_like(x)


@dataclass(frozen=True)
class TracedQuantizer:
    """What a trace keeps of one quantizer.

    `axis` is that of a per-channel scale, None for one scale or blocks; `shape` that of the scale, None where
    the scale is not stored (mxfp8); `block_size` is 0 without blocks.
    """

    kind: str
    axis: int | None
    block_size: int
    shape: tuple[int, ...] | None

    @property
    def bound(self) -> float:
        """What amax is divided by for the scale."""
        return BOUNDS[self.kind]

    @property
    def dynamic(self) -> bool:
        """Whether block scales are found at run time."""
        return self.kind in ("nvfp4", "mxfp8")

    def __call__(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The operator of this quantizer on x."""
        out: torch.Tensor
        if self.dynamic:
            out = block_quantize_dequantize(x, scale, self.kind)
        else:
            out = quantize_dequantize(x, scale, self.kind, self.axis, self.block_size)
        return out


def describe(settings: Settings, amax_size: int, weight: tuple[int, ...] | None) -> TracedQuantizer:
    """Kind, axis and scale shape of a quantizer; `weight` is the shape of the weight that it quantizes, if any."""
    kind, axis, block = kind_of(settings), settings["axis"], block_size_of(settings) or 0
    axis = axis[0] if isinstance(axis, (list, tuple)) else axis
    shape: tuple[int, ...] | None = () if amax_size == 1 and kind != "int4" else (amax_size,)
    if kind == "mxfp8":
        shape = None
    elif kind == "int4":
        if weight is None:
            raise TypeError("blocks of INT4 are for weights")
        shape = (*weight[:-1], weight[-1] // block)
    return TracedQuantizer(kind, None if shape == () else axis, block, shape)


@contextmanager
def traceable(quantizers: Mapping[str, Any], traced: Mapping[str, TracedQuantizer]) -> Iterator[None]:
    """Make these quantizers (by module path) exportable as `traced` says.

    Each gets a buffer `scale`, whose values are never read by the trace. Quantizers that are not listed pass their
    input through, scaled if they scale. Attention calls its quantizers, and then the plain attention.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.plugins.diffusion.diffusers import _QuantAttention

    for name, quantizer in quantizers.items():
        quantizer.register_buffer("scale", torch.ones(traced[name].shape or ()))
        quantizer.diffc_traced = traced[name]

    def forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            inputs = inputs * self.pre_quant_scale
        quantize = getattr(self, "diffc_traced", None)
        return inputs if quantize is None else quantize(inputs, self.scale)

    original, functions = TensorQuantizer.forward, _QuantAttention._functionals_to_replace
    TensorQuantizer.forward = forward
    _QuantAttention._functionals_to_replace = [
        (torch.nn.functional, "scaled_dot_product_attention", _attention)
    ]
    try:
        yield
    finally:
        TensorQuantizer.forward = original
        _QuantAttention._functionals_to_replace = functions


_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """What ModelOpt's quantized attention computes, without its checks: q, k and v are quantized, and the output."""
    query, key = module.q_bmm_quantizer(query), module.k_bmm_quantizer(key)
    value = module.v_bmm_quantizer(value)
    out: torch.Tensor = module.bmm2_output_quantizer(_plain_attention(query, key, value, *args, **kwargs))
    return out
