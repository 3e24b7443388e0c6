"""drop-rounding: activation quantizers without their rounding, so that two graphs can be compared exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before
from passes.graph.grids import is_weight
from passes.graph.match import array_of, producer
from passes.graph.movement import is_move
from passes.weights.evaluate import BOUNDS
from passes.weights.recipe import dtype_of


@register
@dataclass(frozen=True)
class DropRounding(Pass):
    """Replace the quantization of activations by the same scaling and saturation, without rounding.

    1. QuantizeLinear(x, s) of a computed tensor -> Clip(Div(x, s), low, high) with the bounds of its type.
    2. DequantizeLinear(q, s) of a computed tensor -> Mul(q, s).
    3. The dynamic block quantizers of TensorRT with their dequantizers (TRT_FP4DynamicQuantize with two
       DequantizeLinear, TRT_MXFP8DynamicQuantize with TRT_MXFP8DequantizeLinear) -> Cast: they scale to what
       is there, so nothing saturates.

    A rounding to 4 bits of mantissa turns a difference in the last bit of float32 into one of 6 % whenever a
    value lies on the edge between two steps, and the next quantizer multiplies that. Without the rounding, a
    wrong scale, weight or wire still shows, and nothing else does. For validation only: quantized weights
    stay as they are.

    Declines when: the scale is not one number; the zero point is not zero.
    """

    name: ClassVar[str] = "drop-rounding"
    tolerance: ClassVar[float] = 0.2
    _OPS: ClassVar[tuple[str, ...]] = ("QuantizeLinear", "DequantizeLinear")

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every quantizer of a computed tensor."""
        refusals: list[Refusal] = []
        changed = 0
        names = Names(graph)
        for part in walk(graph):
            new: dict[int, list[gs.Node]] = {}
            dead: set[int] = set()
            for node in part.nodes:
                if node.op in _DYNAMIC and not _is_weight(node.inputs[0]):
                    changed += _smooth_blocks(node, names, new, dead)
            for node in part.nodes:
                if id(node) in dead:
                    continue
                if node.op not in self._OPS or _is_weight(node.inputs[0]):
                    continue
                if reason := _reason(node):
                    refusals.append(Refusal(node.name, reason))
                    continue
                new[id(node)] = _replacement(node, names)
                changed += 1
            insert_before(part, new)
            drop_nodes(part, {*new, *dead})
        return PassResult(changed, (), tuple(refusals))


_DYNAMIC = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
_DEQUANTIZERS = ("DequantizeLinear", "TRT_MXFP8DequantizeLinear")


def _smooth_blocks(node: gs.Node, names: Names, new: dict[int, list[gs.Node]], dead: set[int]) -> int:
    """Let what dequantizes the values of a dynamic block quantizer be a Cast of its input; how many."""
    values, scales = node.outputs
    dead.add(id(node))
    if node.op == _DYNAMIC[0]:
        dead.update(id(user) for user in scales.outputs)
    readers = [user for user in values.outputs if user.op in _DEQUANTIZERS]
    for user in readers:
        emitter = Emitter(user, names)
        output = user.outputs[0]
        emitter.emit_to("Cast", [node.inputs[0]], [output], to=dtype_of(output) or TensorProto.FLOAT)
        new[id(user)] = emitter.nodes
        dead.add(id(user))
    return len(readers)


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, or one that the graph quantizes and moves."""
    node = producer(tensor)
    while node is not None and (node.op == "QuantizeLinear" or (is_move(node) and node.op != "Concat")):
        tensor = node.inputs[0]
        node = producer(tensor)
    return is_weight(tensor)


def _reason(node: gs.Node) -> str:
    scale = node.inputs[1]
    if scale.shape not in ([], (), [1], (1,)):
        return f"the scale has shape {scale.shape}, and only one number can be applied without rounding"
    if (
        len(node.inputs) > 2
        and (zero := array_of(node.inputs[2])) is not None
        and np.any(zero.astype(np.float32))
    ):
        return "the zero point is not zero"
    return "" if _quantized_type(node) in BOUNDS else "the quantized type has no known bounds"


def _quantized_type(node: gs.Node) -> int | None:
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return dtype_of(node.inputs[2])
    return int(node.attrs.get("output_dtype", TensorProto.UINT8))


def _retype(tensor: gs.Tensor, dtype: object) -> None:
    """Let `tensor`, and what data movement makes of it on the way to DequantizeLinear, have type `dtype`."""
    pending = [tensor]
    while pending:
        current = pending.pop()
        current.dtype = dtype
        for user in current.outputs:
            if user.op not in DropRounding._OPS:
                pending += [t for t in user.outputs if dtype_of(t) in BOUNDS]


def _replacement(node: gs.Node, names: Names) -> list[gs.Node]:
    """The nodes that take the place of `node`; its output becomes a float tensor."""
    emitter = Emitter(node, names)
    x, scale = node.inputs[:2]
    output = node.outputs[0]
    if node.op == "DequantizeLinear":
        emitter.emit_to("Mul", [x, scale], [output])
        return emitter.nodes
    _retype(output, scale.dtype)
    wide = np.dtype(np.float32)
    low, high = (np.asarray(b, wide) for b in BOUNDS[_quantized_type(node) or 0])
    scaled = emitter.emit("Div", [x, scale], scale.dtype)
    limits = [emitter.constant("low", low), emitter.constant("high", high)]
    if dtype_of(scale) != TensorProto.FLOAT:
        limits = [emitter.emit("CastLike", [limit, scale], scale.dtype) for limit in limits]
    emitter.emit_to("Clip", [scaled, *limits], [output])
    return emitter.nodes
