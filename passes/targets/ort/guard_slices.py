"""guard-slices: keeps ONNX Runtime's optimizer from slicing FP8 values, which ONNX does not define."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Names
from passes.graph.match import producer
from passes.weights.recipe import dtype_of

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

    Fires on a Slice whose output reaches a QuantizeLinear to FP8 through nothing but Reshape, Transpose, Squeeze and
    Unsqueeze. Not for INT8, which Slice has, and not for a Slice that is guarded already.
    """

    name: ClassVar[str] = "guard-slices"

    def run(self, graph: gs.Graph) -> PassResult:
        """The Slice gets an output of its own; the Concat gives the tensor that was the Slice's."""
        names, count = Names(graph), 0
        for part in walk(graph):
            slices = {id(node) for q in part.nodes if _makes_float8(q) for node in _slice_above(q)}
            count += len(slices)
            part.nodes = [new for node in part.nodes for new in _guarded(node, id(node) in slices, names)]
        return PassResult(count, (f"{count} Slices guarded",) if count else ())


def _guarded(node: gs.Node, fires: bool, names: Names) -> list[gs.Node]:
    """The node, followed by the Concat when the pass fires."""
    if not fires:
        return [node]
    (value,) = node.outputs
    inner = gs.Variable(names.fresh(f"{value.name}_sliced"), value.dtype, value.shape)
    node.outputs = [inner]
    return [node, gs.Node("Concat", names.fresh(f"{node.name}/Concat"), {"axis": 0}, [inner], [value])]


def _makes_float8(node: gs.Node) -> bool:
    if node.op != "QuantizeLinear":
        return False
    zero = dtype_of(node.inputs[2]) if len(node.inputs) > 2 else node.attrs.get("output_dtype")
    return zero in _FLOAT8


def _slice_above(quantizer: gs.Node) -> list[gs.Node]:
    """The Slice that what is quantized comes from, through operators that only move; empty when there is none."""
    node = producer(quantizer.inputs[0])
    while node is not None and node.op in _MOVED_ACROSS:
        node = producer(node.inputs[0])
    return [node] if node is not None and node.op == "Slice" else []
