"""drop-rounding: activation quantizers without their rounding, so that two graphs can be compared exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.grids import quantized_type
from passes.graph.match import View, array_of, input_of, is_constant, producer
from passes.graph.movement import is_move
from passes.weights.evaluate import BOUNDS
from passes.weights.recipe import dtype_of

_LINEAR = ("QuantizeLinear", "DequantizeLinear")
_FP4 = "TRT_FP4DynamicQuantize"
_DYNAMIC = (_FP4, "TRT_MXFP8DynamicQuantize")
_DEQUANTIZERS = ("DequantizeLinear", "TRT_MXFP8DequantizeLinear")


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

        before: DequantizeLinear(QuantizeLinear(x, s), s)      after: Mul(Clip(Div(x, s), low, high), s)
        before: DQ(values, DQ(scales, s)) of TRT_FP4DynamicQuantize(x, s)      after: Cast(x)

    Declines when: the scale is not one number; the zero point is not zero; anything but a dequantizer reads what a
    dynamic block quantizer gives.
    """

    name: ClassVar[str] = "drop-rounding"
    tolerance: ClassVar[float] = 0.2

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every quantizer of a computed tensor."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "quantizers of activations do not round")

    def match(self, node: gs.Node, view: View) -> _Found | str | None:
        """A quantizer or dequantizer of a computed tensor; dequantizers of blocks belong to their quantizer."""
        if node.op not in (*_LINEAR, *_DYNAMIC) or _is_weight(node.inputs[0]):
            return None
        if node.op in _DYNAMIC:
            return _blocks(node, view)
        source = producer(node.inputs[0])
        if source is not None and source.op in _DYNAMIC:
            return None
        return _reason(node) or _Found(node)

    def rewrite(self, found: _Found, edit: Edit) -> None:
        """Write the quantizer without its rounding."""
        node = found.node
        if node.op in _DYNAMIC:
            _rewrite_blocks(found, edit)
        elif node.op == "DequantizeLinear":
            # DequantizeLinear(q, s)  ->  Mul(q, s)
            edit.at(node).emit_to("Mul", node.inputs[:2], edit.release(node))
        else:
            _rewrite_quantizer(node, edit)


@dataclass(frozen=True)
class _Found:
    """A QuantizeLinear or DequantizeLinear with one scale and no zero point, or a dynamic block quantizer.

    Of that, `dequantizers` read the values, and `scales` are what dequantizes its scales (FP4).
    """

    node: gs.Node
    dequantizers: Sequence[gs.Node] = ()
    scales: Sequence[gs.Node] = ()


def _blocks(node: gs.Node, view: View) -> _Found | str | None:
    """A dynamic block quantizer whose values and scales are only dequantized, or why not; None if nothing reads it."""
    values, scales = node.outputs
    found = _Found(node, list(values.outputs), list(scales.outputs) if node.op == _FP4 else [])
    if not found.dequantizers:
        return None
    if (other := next(_other_readers(found), None)) is not None:
        return f"{other.op} node {other.name!r} reads what it gives, not only its dequantizers"
    given = (*node.outputs, *(scale.outputs[0] for scale in found.scales))
    return "what it gives is a graph output" if any(id(tensor) in view.outputs for tensor in given) else found


def _other_readers(found: _Found) -> Iterator[gs.Node]:
    """What reads values or scales and dequantizes no values. FP4 has its scales dequantized first."""
    yield from (user for user in found.dequantizers if user.op not in _DEQUANTIZERS)
    yield from (user for user in found.scales if user.op != "DequantizeLinear")
    known = {id(user) for user in found.dequantizers}
    wide = [scale.outputs[0] for scale in found.scales] or found.node.outputs[1:]
    yield from (user for tensor in wide for user in tensor.outputs if id(user) not in known)


def _rewrite_blocks(found: _Found, edit: Edit) -> None:
    """DQ(values, ...) of a quantizer of x  ->  Cast(x) to the type that the DQ gives"""
    for user in found.dequantizers:
        to = dtype_of(user.outputs[0]) or TensorProto.FLOAT
        new = edit.at(user)
        new.emit_to("Cast", [found.node.inputs[0]], edit.release(user), to=to)
    edit.remove(found.node, *found.scales)


def _rewrite_quantizer(node: gs.Node, edit: Edit) -> None:
    """QuantizeLinear(x, s)  ->  Clip(Div(x, s), low, high), a float tensor as all that moves it"""
    (x, scale), new = node.inputs[:2], edit.at(node)
    (output,) = edit.release(node)
    _retype(output, scale.dtype)
    low, high = (np.asarray(bound, np.float32) for bound in BOUNDS[quantized_type(node)])
    scaled = new.emit("Div", [x, scale], scale.dtype)
    limits: list[gs.Tensor] = [new.constant("low", low), new.constant("high", high)]
    if dtype_of(scale) != TensorProto.FLOAT:
        limits = [new.emit("CastLike", [limit, scale], scale.dtype) for limit in limits]
    new.emit_to("Clip", [scaled, *limits], [output])


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant, or one that the graph quantizes and moves."""
    node = producer(tensor)
    while node is not None and (node.op == "QuantizeLinear" or (is_move(node) and node.op != "Concat")):
        tensor = node.inputs[0]
        node = producer(tensor)
    return is_constant(tensor)


def _reason(node: gs.Node) -> str:
    """Why a QuantizeLinear or DequantizeLinear has to round, or nothing."""
    scale, zero = node.inputs[1], input_of(node, 2)
    if scale.shape not in ([], (), [1], (1,)):
        return f"the scale has shape {scale.shape}, and only one number can be applied without rounding"
    held = None if zero is None else array_of(zero)
    if held is not None and np.any(held.astype(np.float32)):
        return "the zero point is not zero"
    return "" if quantized_type(node) in BOUNDS else "the quantized type has no known bounds"


def _retype(tensor: gs.Tensor, dtype: object) -> None:
    """Let `tensor`, and what data movement makes of it on the way to DequantizeLinear, have type `dtype`."""
    pending = [tensor]
    while pending:
        current = pending.pop()
        current.dtype = dtype
        for user in current.outputs:
            if user.op not in _LINEAR:
                pending += [t for t in user.outputs if dtype_of(t) in BOUNDS]
