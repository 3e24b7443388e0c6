"""type-trt-ops: element types and shapes of TensorRT's operators, and of all that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from passes.base import Pass, PassError, PassResult, Refusal, register, walk
from passes.graph.inference import shell, walk_protos
from passes.graph.match import STANDARD
from passes.graph.to_onnx import export_model
from passes.graph.trt_ops import TRT_OPS, Output, is_trt, trt_op
from passes.weights.recipe import dtype_of

_END = 2**31 - 1  # Slice: to the end
_NAMELESS = "unk__"  # how ONNX's inference calls a dimension that it knows nothing of


@register
@dataclass(frozen=True)
class TypeTrtOps(Pass):
    """Give every tensor its element type and shape, in graphs with operators of domain `trt`.

    1. Output of such an operator -> the type of `passes.graph.trt_ops`, by operator and place; a wrong one that an
       exporter wrote is replaced (UINT8 where the operator makes E4M3).
    2. Every other tensor -> the type that ONNX infers from there.
    3. Shapes likewise, in numbers and symbols; what ONNX cannot know stays as the exporter wrote it.

    For this, a copy in which standard operators of the same types and shapes stand in goes through ONNX's inference
    once, so the cost is linear. Subgraphs too.

    Declines, by node, when: ONNX cannot know a type (operators of other domains, what follows from them, and what
    follows from inputs that contradict each other, which match-types fixes). Raises PassError where an axis is not
    whole blocks.
    """

    name: ClassVar[str] = "type-trt-ops"
    changes_types: ClassVar[bool] = True

    def run(self, graph: gs.Graph) -> PassResult:
        """Change types and shapes; the graph keeps its nodes."""
        if not any(is_trt(node) for part in walk(graph) for node in part.nodes):
            return PassResult()
        inferred = _infer(export_model(graph))
        changed = 0
        for part, body in zip(walk(graph), walk_protos(inferred.graph), strict=True):
            known = {value.name: value for value in (*body.value_info, *body.output)}
            tensors = {t.name: t for node in part.nodes for t in node.outputs if not t.is_empty()}
            changed += sum(_take(tensor, known[name]) for name, tensor in tensors.items() if name in known)
        _check_blocks(graph)
        notes = (f"types or shapes of {changed} tensors",) if changed else ()
        return PassResult(changed, notes, tuple(_untyped(graph)))


def _take(tensor: gs.Variable, value: ValueInfoProto) -> bool:
    """Give a tensor what was inferred of it; whether that is news."""
    found = OnnxImporter.import_tensor(value)
    before = dtype_of(tensor), tensor.shape
    if dtype_of(found):
        tensor.dtype, tensor.type = found.dtype, found.type
    if tensor.shape is None or found.shape is None or len(tensor.shape) != len(found.shape):
        tensor.shape = tensor.shape if found.shape is None else found.shape
    else:
        tensor.shape = [
            old if new is None or (old is not None and str(new).startswith(_NAMELESS)) else new
            for old, new in zip(tensor.shape, found.shape, strict=True)
        ]
    return before != (dtype_of(tensor), tensor.shape)


def _untyped(graph: gs.Graph) -> Iterator[Refusal]:
    for part in walk(graph):
        for node in part.nodes:
            missing = [t.name for t in node.outputs if not t.is_empty() and not dtype_of(t)]
            if missing:
                yield Refusal(node.name, f"no type is known of output {missing[0]!r} of {node.op}")


def _check_blocks(graph: gs.Graph) -> None:
    for part in walk(graph):
        for node in filter(is_trt, part.nodes):
            entry, shape, axis = TRT_OPS[node.op], node.inputs[0].shape, node.attrs.get("axis", -1)
            if not entry.block_size or shape is None:
                continue
            size = node.attrs.get("block_size", entry.block_size)
            inside = -len(shape) <= axis < len(shape)
            if not inside or (isinstance(shape[axis], int) and shape[axis] % size):
                raise PassError(
                    f"{node.op} node {node.name!r}: axis {axis} of shape {shape} is not whole blocks of {size}"
                    ". Fix: quantize with a block size that divides the axis"
                )


def _infer(model: ModelProto) -> ModelProto:
    """The stand-in with the types and shapes that follow from its inputs; contradictions are for the check."""
    copy = shell(model)
    for body in walk_protos(copy.graph):
        _forget_types(body)
        nodes = [stand_in for node in body.node for stand_in in _stand_ins(node)]
        del body.node[:]
        body.node.extend(nodes)
    inferred: ModelProto = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return inferred


def _forget_types(body: GraphProto) -> None:
    """Drop the element types that ONNX or the table can find anew; those of operators unknown to both stay.

    So do the symbols that an exporter made up for TensorRT's outputs: theirs are those of the input.
    """
    makers = {name: node for node in body.node for name in node.output}
    for value in (*body.value_info, *body.output):
        maker = makers.get(value.name)
        if maker is None or not value.type.HasField("tensor_type"):
            continue
        if maker.domain in STANDARD or _is_trt(maker):
            value.type.tensor_type.elem_type = onnx.TensorProto.UNDEFINED
    for value in body.value_info:
        if value.name in makers and _is_trt(makers[value.name]):
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("dim_param")


def _is_trt(node: NodeProto) -> bool:
    return trt_op(node.domain, node.op_type) is not None


def _stand_ins(node: NodeProto) -> Iterator[NodeProto]:
    """Standard nodes whose outputs have the types and shapes of one of TensorRT's; any other node as it is."""
    entry = trt_op(node.domain, node.op_type)
    if entry is None:
        yield node
        return
    attributes = {item.name: item.i for item in node.attribute}
    for output, name in zip(entry.outputs, node.output, strict=False):
        if not name:
            continue
        source = node.input[0]
        if output.blocks:
            source = f"{name}/type-trt-ops"
            yield from _every_block(node.input[0], source, attributes, entry.block_size)
        yield _retyped(output, source, name, node, attributes)


def _retyped(
    output: Output, source: str, name: str, node: NodeProto, attributes: dict[str, int]
) -> NodeProto:
    """Cast or CastLike to the type of an output."""
    has_like = output.like is not None and len(node.input) > output.like and node.input[output.like] != ""
    if not attributes.get(output.attribute) and has_like and output.like is not None:
        return onnx.helper.make_node("CastLike", [source, node.input[output.like]], [name])
    return onnx.helper.make_node(
        "Cast", [source], [name], to=attributes.get(output.attribute) or output.dtype
    )


def _every_block(x: str, out: str, attributes: dict[str, int], block_size: int) -> Iterator[NodeProto]:
    """`out` has one element for each block of `x`: Slice with the block size as its step."""
    numbers = {
        "starts": 0,
        "ends": _END,
        "axes": attributes.get("axis", -1),
        "steps": attributes.get("block_size", block_size),
    }
    for key, number in numbers.items():
        yield onnx.helper.make_node("Constant", [], [f"{out}/{key}"], value_ints=[number])
    yield onnx.helper.make_node("Slice", [x, *(f"{out}/{key}" for key in numbers)], [out])
