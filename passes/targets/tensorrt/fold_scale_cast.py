"""fold-scale-cast: DequantizeLinear with float32 scales gives the 16-bit type itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, is_op, is_weight, producer
from passes.weights.recipe import dtype_of

_WIDE, _NARROW = TensorProto.FLOAT, (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_STORED = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)


@register
@dataclass(frozen=True)
class FoldScaleCast(Pass):
    """Let a DequantizeLinear of a stored weight have `output_dtype`, which TensorRT fuses into the product.

        before: Cast(DequantizeLinear(codes, s float32), to=bfloat16)
        after:  DequantizeLinear(codes, s float32, output_dtype=bfloat16)

    Scales stay float32, as the file has them. ONNX Runtime 1.31 does not take this form.

    Declines when: anything but the Cast reads the float32 weight; there are blocks, whose scales TensorRT wants in the
    type of the result. FP4 stays as it is: TensorRT has a form of its own for it.
    """

    name: ClassVar[str] = "fold-scale-cast"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every Cast on a dequantized constant."""
        return Edit(graph).rewrite_each(_wide, _fold, "casts folded into DequantizeLinear")


def _wide(cast: gs.Node, view: View) -> gs.Node | str | None:
    """The DequantizeLinear of a stored weight that a Cast to 16 bits reads; a reason where the two must stay."""
    wide = producer(cast.inputs[0]) if is_op(cast, "Cast") else None
    if not is_op(wide, "DequantizeLinear") or not is_weight(wide.inputs[0]):
        return None
    if int(cast.attrs["to"]) not in _NARROW or dtype_of(wide.inputs[1]) != _WIDE:
        return None
    if dtype_of(wide.inputs[0]) not in _STORED:
        return None
    if wide.attrs.get("block_size"):
        return "its scales are of blocks"
    return wide if view.is_sole(wide.outputs[0]) else "its float32 result has another reader"


def _fold(wide: gs.Node, edit: Edit) -> None:
    (cast,) = wide.outputs[0].outputs
    wide.attrs["output_dtype"] = int(cast.attrs["to"])
    wide.outputs = edit.release(cast)
