"""ModelOpt quantizers as a custom operator, so that torch.export sees one node where ModelOpt has checks.

`TensorQuantizer.forward` cannot be exported (it branches on data). For the time of a trace it is replaced by the
operator `diffc::quantize_dequantize`, which is translated to the ONNX nodes of the quantizer's kind
(`diffc.quantize.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from diffc.quantize.attention import attention_as, plain_attention
from diffc.quantize.kinds import KINDS, Kind, Settings, block_size_of, kind_of


@torch.library.custom_op("diffc::quantize_dequantize", mutates_args=())
def quantize_dequantize(
    x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None, block_size: int
) -> torch.Tensor:
    """What remains of x when it is quantized and dequantized, computed in float32; result in x's dtype.

    `kind` is a name of `KINDS`. Where its scale is calibrated, this is ONNX QuantizeLinear then DequantizeLinear with
    a zero zero point: `scale` is first rounded to x's dtype, as both operators want it, and is a scalar, of shape
    [x.shape[axis]], or, with a `block_size` above 0, of the shape of x with the last axis divided by it. Where scales
    of blocks are dynamic, `scale` is the float32 scalar of the whole tensor, which MXFP8 does not use.
    """
    row = KINDS[kind]
    return row.round_trip(
        x, scale if row.dynamic else _spread(scale.to(x.dtype).float(), x, axis, block_size)
    )


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int | None, block_size: int) -> torch.Tensor:
    """`scale` in a shape that broadcasts against x."""
    if block_size:
        return scale.repeat_interleave(block_size, -1)
    if axis is None:
        return scale
    return scale.reshape([-1 if i == axis % x.dim() else 1 for i in range(x.dim())])


@quantize_dequantize.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, kind: str, axis: int | None, block_size: int) -> torch.Tensor:
    del scale, kind, axis, block_size
    return torch.empty_like(x)


def quantizer_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entry of torch.onnx.export's `custom_translation_table` for the operator."""

    def nodes(x: Any, scale: Any, kind: str, axis: int | None, block_size: int) -> Any:
        return KINDS[kind].onnx_nodes(x, scale, axis, block_size)

    return {torch.ops.diffc.quantize_dequantize.default: nodes}


@dataclass(frozen=True)
class TracedQuantizer:
    """What a trace keeps of one quantizer.

    `axis` is that of a per-channel scale, None for one scale or blocks; `shape` that of the scale, None where
    the scale is not stored (mxfp8); `block_size` is 0 without blocks.
    """

    kind: Kind
    axis: int | None
    block_size: int
    shape: tuple[int, ...] | None

    def __call__(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The operator of this quantizer on x."""
        out: torch.Tensor = quantize_dequantize(x, scale, self.kind.name, self.axis, self.block_size)
        return out


def describe(settings: Settings, amax_size: int, weight: tuple[int, ...] | None) -> TracedQuantizer:
    """Kind, axis and scale shape of a quantizer; `weight` is the shape of the weight that it quantizes, if any.

    Raises TypeError for calibrated blocks of anything but a weight.
    """
    kind, block = kind_of(settings), block_size_of(settings) or 0
    axis = settings["axis"]
    axis = axis[0] if isinstance(axis, (list, tuple)) else axis
    if not kind.has_amax:
        return TracedQuantizer(kind, axis, block, None)
    if kind.blocks == "static":
        if weight is None:
            raise TypeError(f"blocks of {kind} are for weights")
        return TracedQuantizer(kind, axis, block, (*weight[:-1], weight[-1] // block))
    if amax_size == 1:
        return TracedQuantizer(kind, None, block, ())
    return TracedQuantizer(kind, axis, block, (amax_size,))


@contextmanager
def traceable(quantizers: Mapping[str, Any], traced: Mapping[str, TracedQuantizer]) -> Iterator[None]:
    """Make these quantizers (by module path) exportable as `traced` says.

    Each gets a buffer `scale`, whose values are never read by the trace. Quantizers that are not listed pass their
    input through, scaled if they scale. Attention calls its quantizers, and then the plain attention.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    for name, quantizer in quantizers.items():
        quantizer.register_buffer("scale", torch.ones(traced[name].shape or ()))
        quantizer.diffc_traced = traced[name]

    def forward(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            inputs = inputs * self.pre_quant_scale
        quantize = getattr(self, "diffc_traced", None)
        return inputs if quantize is None else quantize(inputs, self.scale)

    with patch.object(TensorQuantizer, "forward", forward), attention_as(plain_attention):
        yield
