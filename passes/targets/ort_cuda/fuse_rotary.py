"""fuse-rotary: rotary position embedding spelled out in a dozen operators becomes one of ONNX Runtime's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Emitter
from passes.graph.match import MICROSOFT, View, cut_of, dims, is_op, number_of, producer
from passes.graph.pattern import Made, Match
from passes.weights.recipe import dtype_of

_FLOAT = np.dtype(np.float32)
_LAST = np.iinfo(np.int64).max


def _half(name: str) -> Made:
    """Every second value of x: one of the two columns of x as pairs."""
    pairs = Made("Reshape", "x", ..., name=f"pairs of {name}")
    return Made("Squeeze", Made("Slice", pairs, ..., name=name), ...)


_TURNED = Made(
    "Reshape",
    Made(
        "Concat",
        Made("Unsqueeze", Made("Neg", _half("odd")), ...),
        Made("Unsqueeze", _half("even"), ...),
        name="join",
    ),
    ...,
)
ROTATION = Made(
    "Add",
    Made("Mul", Made("Cast", "x", optional=True, name="wide"), "cos"),
    Made("Mul", Made("Cast", _TURNED, optional=True), "sin"),
)


@dataclass(frozen=True)
class Rotation:
    """A rotation's last node, x (batch, tokens, heads, size) in float32, tables (tokens, size) of cosines and sines."""

    total: gs.Node
    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor


@register
@dataclass(frozen=True)
class FuseRotary(Pass):
    """Write the rotation of pairs of neighbours by a table of angles as com.microsoft's RotaryEmbedding.

        before: Add(Mul(x, cos), Mul(turned, sin)), turned = (-x[1], x[0], -x[3], x[2], ...)
        after:  Reshape(RotaryEmbedding(Reshape(x), 0, cos[:, ::2], sin[:, ::2]))

    x is float32 of four axes (batch, tokens, heads, size). Exact: as before, products and sum are made in float32
    (casts around it stay). Operators that then have no reader are left to remove-unused.

    Declines when: heads and size are not numbers, or x is not float32; `turned` takes other values; cos and sin are not
    tables (1, tokens, 1, size) whose values are computed once for each pair and written twice.
    """

    name: ClassVar[str] = "fuse-rotary"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the sum of each rotation."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "rotations")

    def match(self, node: gs.Node, view: View) -> Rotation | str | None:
        """The rotation whose last operator the node is."""
        reason = None
        for found in ROTATION.matches(node, view):
            cos, sin = _table(found["cos"]), _table(found["sin"])
            reason = _reason(found)
            if reason is None and cos is not None and sin is not None:
                return Rotation(node, found["wide"], cos, sin)
            reason = reason or "cos and sin are not tables (1, tokens, 1, size) of doubled values"
        return reason

    def rewrite(self, found: Rotation, edit: Edit) -> None:
        """RotaryEmbedding over (batch, tokens, heads * size), between two Reshapes."""
        new, shape = edit.at(found.total), list(found.x.shape)
        heads, size = (int(n) for n in shape[2:])
        wide = [*shape[:2], heads * size]
        # (batch, tokens, heads, size) -> (batch, tokens, heads * size); the first position of every image is 0
        flat, first = new.ints("flat", 0, 0, heads * size), new.ints("first", 0)
        inputs = [new.emit("Reshape", [found.x, flat], _FLOAT, wide), first]
        inputs += [_half_of(table, new, edit) for table in (found.cos, found.sin)]
        attrs = {"num_heads": heads, "interleaved": 1}
        turned = new.emit("RotaryEmbedding", inputs, _FLOAT, wide, domain=MICROSOFT, **attrs)
        # and back
        new.emit_to("Reshape", [turned, new.ints("split", 0, 0, heads, size)], edit.release(found.total))


def _half_of(table: gs.Tensor, new: Emitter, edit: Edit) -> gs.Tensor:
    """The table without the doubled values, made once for all rotations."""
    if id(table) not in edit.made:
        bounds = [new.ints(*item) for item in (("start", 0), ("end", _LAST), ("axis", 1), ("step", 2))]
        edit.made[id(table)] = new.emit(
            "Slice", [table, *bounds], _FLOAT, [table.shape[0], int(table.shape[1]) // 2]
        )
    return edit.made[id(table)]


def _reason(found: Match) -> str | None:
    """Why a rotation of this form must stay, whatever its tables are."""
    x, join = found["wide"], found["join"]
    shape = dims(x)
    if len(shape) != 4 or not all(isinstance(n, (int, np.integer)) for n in shape[2:]):
        return "x is not (batch, tokens, heads, size) with known heads and size"
    if dtype_of(x) != TensorProto.FLOAT or dtype_of(found.nodes[0].outputs[0]) != TensorProto.FLOAT:
        return "it is not computed in float32"
    pairs = [shape[2], shape[3] // 2, 2]
    if any(dims(t)[2:] != pairs for t in (join, found["pairs of odd"], found["pairs of even"])):
        return "the last axis is not taken as pairs"
    if found.node("join").attrs.get("axis") not in (-1, 4) or not (
        _takes(found, "odd", 1) and _takes(found, "even", 0)
    ):
        return "the pairs are not turned to (-x[1], x[0])"
    return None


def _takes(found: Match, half: str, column: int) -> bool:
    """Whether a half is that column of the pairs."""
    cut = cut_of(found.node(half))
    if cut is None or cut.axis != 4 or number_of(cut.start) != column:
        return False
    end = number_of(cut.end)
    return end is not None and (end >= 2 if column else end == 1)


def _table(tensor: gs.Tensor) -> gs.Tensor | None:
    """The table (tokens, size) that is seen as (1, tokens, 1, size), its values twice in a row."""
    shape = dims(tensor)
    if len(shape) != 4 or shape[0] != 1 or shape[2] != 1 or dtype_of(tensor) != TensorProto.FLOAT:
        return None
    current = tensor
    while (node := producer(current)) is not None and node.op in ("Unsqueeze", "Slice"):
        cut = cut_of(node)
        if node.op == "Slice" and (cut is None or not cut.takes_all):
            return None
        current = node.inputs[0]
    flat = len(dims(current)) == 2 and current.shape[1] == shape[3]
    return current if flat and _is_doubled(current) else None


def _is_doubled(tensor: gs.Tensor) -> bool:
    """Whether each value along the last axis stands there twice in a row."""
    node = producer(tensor)
    if is_op(node, "Cast"):
        return _is_doubled(node.inputs[0])
    if is_op(node, "Concat") and node.attrs.get("axis") in (-1, len(dims(tensor)) - 1):
        return all(_is_doubled(item) for item in node.inputs)
    # Reshape(Expand(Unsqueeze(x))): (..., n) -> (..., n, 1) -> (..., n, 2) -> (..., 2 n)
    spread = producer(node.inputs[0]) if is_op(node, "Reshape") else None
    if not is_op(spread, "Expand") or not is_op(producer(spread.inputs[0]), "Unsqueeze"):
        return False
    before, after = spread.inputs[0].shape, spread.outputs[0].shape
    if before is None or after is None or tensor.shape is None:
        return False
    return bool(before[-1] == 1 and after[-1] == 2 and tensor.shape[-1] == 2 * after[-2])
