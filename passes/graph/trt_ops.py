"""TensorRT's quantization operators as data: what each output is, by operator and place, never by its name.

ONNX has no schema for them. The types are those that TensorRT's parsers and ModelOpt agree on; where ModelOpt writes
another one (UINT8 for E4M3, which its FP8 exporter does) the parser goes by the operator, and so does this table.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs
from onnx import TensorProto

DOMAIN, VERSION = "trt", 1
FOUR_OVER_SIX = "four_over_six"
"""An attribute of TRT_FP4DynamicQuantize of a weight, which fold-weight-qdq reads: TensorRT never sees it."""

_E4M3, _FP4 = int(TensorProto.FLOAT8E4M3FN), int(TensorProto.FLOAT4E2M1)
_INT4, _UINT8 = int(TensorProto.INT4), int(TensorProto.UINT8)


@dataclass(frozen=True)
class Output:
    """One output. Its element type is what `attribute` names, else that of input `like`, else `dtype`.

    Its shape is that of input 0; with `blocks` the attribute `axis` (the last) is divided by `block_size`.
    """

    dtype: int = 0
    attribute: str = ""
    like: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class TrtOp:
    """An operator: its outputs, and the block size where a node does not say it (0: it has no blocks)."""

    outputs: tuple[Output, ...]
    block_size: int = 0


TRT_OPS: dict[str, TrtOp] = {
    "TRT_FP8QuantizeLinear": TrtOp((Output(_E4M3),)),
    "TRT_FP8DequantizeLinear": TrtOp((Output(like=1),)),
    "TRT_INT4QuantizeLinear": TrtOp((Output(_INT4),)),
    "TRT_INT4DequantizeLinear": TrtOp((Output(like=1),)),
    # `output_dtype` is ours: emulate-fp4 says with it that the values are E4M3.
    "TRT_FP4DynamicQuantize": TrtOp(
        (Output(_FP4, attribute="output_dtype"), Output(_E4M3, attribute="scale_type", blocks=True)), 16
    ),
    "TRT_FP4QDQ": TrtOp((Output(like=0),), 16),
    "TRT_MXFP8DynamicQuantize": TrtOp(
        (Output(_E4M3, attribute="output_dtype"), Output(_UINT8, blocks=True)), 32
    ),
    "TRT_MXFP8DequantizeLinear": TrtOp((Output(int(TensorProto.FLOAT), attribute="output_dtype"),), 32),
    # What ModelOpt leaves when it renames the operators above but not their domain.
    "QuantizeLinear": TrtOp((Output(_UINT8, attribute="output_dtype", like=2),)),
    "DequantizeLinear": TrtOp((Output(attribute="output_dtype", like=1),)),
}
"""By operator; all are of `DOMAIN`."""


def trt_op(domain: str | None, op: str) -> TrtOp | None:
    """The entry of a node's operator; None when it is not one of TensorRT's."""
    return TRT_OPS.get(op) if domain == DOMAIN else None


def is_trt(node: gs.Node) -> bool:
    """Whether the node is an operator of the table."""
    return trt_op(node.domain, node.op) is not None
