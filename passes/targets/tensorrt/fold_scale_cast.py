"""fold-scale-cast: DequantizeLinear with float32 scales gives the 16-bit type itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import drop_nodes
from passes.graph.grids import is_weight
from passes.graph.match import is_op, output_ids
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
        outputs, dead, refusals = output_ids(graph), set[int](), list[Refusal]()
        for part in walk(graph):
            for node in part.nodes:
                wide = node.inputs[0].inputs[0] if is_op(node, "Cast") and node.inputs[0].inputs else None
                if not is_op(wide, "DequantizeLinear") or not is_weight(wide.inputs[0]):
                    continue
                if int(node.attrs["to"]) not in _NARROW or dtype_of(wide.inputs[1]) != _WIDE:
                    continue
                if dtype_of(wide.inputs[0]) not in _STORED:
                    continue
                if reason := _reason(wide, outputs):
                    refusals.append(Refusal(wide.name, reason))
                    continue
                wide.attrs["output_dtype"] = int(node.attrs["to"])
                wide.outputs = list(node.outputs)
                node.outputs.clear()
                dead.add(id(node))
        drop_nodes(graph, dead)
        notes = (f"{len(dead)} casts folded into DequantizeLinear",) if dead else ()
        return PassResult(len(dead), notes, tuple(refusals))


def _reason(wide: gs.Node, outputs: set[int]) -> str:
    """Why the Cast must stay, or nothing."""
    if wide.attrs.get("block_size"):
        return "its scales are of blocks"
    if len(wide.outputs[0].outputs) != 1 or id(wide.outputs[0]) in outputs:
        return "its float32 result has another reader"
    return ""
