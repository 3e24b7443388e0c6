"""guard-slices: keeps ONNX Runtime's optimizer from slicing FP8 values, which ONNX does not define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.grids import quantized_type
from passes.graph.match import View, is_op, producer

_FLOAT8 = {
    int(onnx.TensorProto.FLOAT8E4M3FN),
    int(onnx.TensorProto.FLOAT8E4M3FNUZ),
    int(onnx.TensorProto.FLOAT8E5M2),
    int(onnx.TensorProto.FLOAT8E5M2FNUZ),
}
# What ONNX Runtime moves a QuantizeLinear across, besides Slice (QDQPropagationTransformer).
_MOVED_ACROSS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


@register
@dataclass(frozen=True)
class GuardSlices(Pass):
    """Put a Concat of one tensor, which changes nothing, between a Slice and the FP8 QuantizeLinear that follows it.

    ONNX Runtime moves QuantizeLinear up across Slice whatever the type, and then rejects its own Slice of FP8
    (INVALID_GRAPH), unless the session says `session.disable_quant_qdq`. It moves nothing across a Concat, and removes
    none; TensorRT does.

        before: QuantizeLinear(Slice(x))      after: QuantizeLinear(Concat{axis=0}(Slice(x)))

    Fires on a Slice whose output reaches a QuantizeLinear to FP8 through nothing but Reshape, Transpose, Squeeze and
    Unsqueeze. Not for INT8, which Slice has, and not for a Slice that is guarded already.
    """

    name: ClassVar[str] = "guard-slices"

    def run(self, graph: gs.Graph) -> PassResult:
        """Find the Slices from the quantizers that they lead to, then guard each."""
        edit = Edit(graph)
        quantizers = (node for part in edit.view.parts for node in part.nodes if _makes_float8(node))
        slices = {id(node) for quantizer in quantizers for node in _slice_above(quantizer)}

        def match(node: gs.Node, _view: View) -> gs.Node | None:
            return node if id(node) in slices else None

        return edit.rewrite_each(match, _guard, "Slices guarded")


def _guard(node: gs.Node, edit: Edit) -> None:
    """Slice(x)  ->  Concat(Slice(x)): the Slice gets an output of its own, the Concat gives the tensor that was its."""
    (value,) = node.outputs
    inner = gs.Variable(edit.names.fresh(f"{value.name}_sliced"), value.dtype, value.shape)
    node.outputs = [inner]
    edit.at(node, after=True).emit_to("Concat", [inner], [value], axis=0)


def _makes_float8(node: gs.Node) -> bool:
    return is_op(node, "QuantizeLinear") and quantized_type(node) in _FLOAT8


def _slice_above(quantizer: gs.Node) -> list[gs.Node]:
    """The Slice that what is quantized comes from, through operators that only move; empty when there is none."""
    node = producer(quantizer.inputs[0])
    while node is not None and node.op in _MOVED_ACROSS:
        node = producer(node.inputs[0])
    return [node] if is_op(node, "Slice") else []
