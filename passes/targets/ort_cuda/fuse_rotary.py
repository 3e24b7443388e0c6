"""fuse-rotary: rotary position embedding spelled out in a dozen operators becomes one of ONNX Runtime's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before
from passes.graph.match import array_of, producer, uncast
from passes.targets.ort_cuda.flatten_attention import MICROSOFT
from passes.weights.recipe import dtype_of

_END = np.iinfo(np.int64).max


class Rotation(NamedTuple):
    """x (batch, tokens, heads, size) in float32, and the tables (tokens, size) of cosines and sines."""

    x: gs.Tensor
    cos: gs.Tensor
    sin: gs.Tensor


@register
@dataclass(frozen=True)
class FuseRotary(Pass):
    """Write x * cos + rotated(x) * sin as com.microsoft's RotaryEmbedding, of pairs of neighbours.

    Fires where rotated(x) is made of pairs (-x[2i+1], x[2i]), x is float32 of four axes (batch, tokens, heads,
    size), and cos and sin are tables whose values are computed once for each pair and written twice. Exact: as
    before, products and sum are made in float32 (casts around it stay). Operators that then have no reader are left
    to remove-unused.
    """

    name: ClassVar[str] = "fuse-rotary"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the sum of each rotation."""
        names, dead = Names(graph), set[int]()
        for part in walk(graph):
            new: dict[int, list[gs.Node]] = {}
            halves: dict[int, gs.Tensor] = {}
            for node in part.nodes:
                found = _rotation(node)
                if found is None:
                    continue
                new[id(node)] = _fuse(node, found, Emitter(node, names), halves)
                dead.add(id(node))
            insert_before(part, new)
        drop_nodes(graph, dead)
        return PassResult(len(dead), (f"{len(dead)} rotations",) if dead else ())


def _rotation(node: gs.Node) -> Rotation | None:
    """The rotation whose last operator the node is."""
    if node.op != "Add" or len(node.inputs) != 2 or dtype_of(node.outputs[0]) != TensorProto.FLOAT:
        return None
    left, right = (producer(tensor) for tensor in node.inputs)
    if left is None or right is None or left.op != "Mul" or right.op != "Mul":
        return None
    for straight, turned in ((left, right), (right, left)):
        x, cos = straight.inputs
        other, sin = turned.inputs
        tables = _table(cos), _table(sin)
        if tables[0] is None or tables[1] is None or not _four_axes(x):
            continue
        if uncast(x) is _turned(uncast(other)):
            return Rotation(x, tables[0], tables[1])
    return None


def _four_axes(x: gs.Tensor) -> bool:
    shape = x.shape
    return shape is not None and len(shape) == 4 and all(isinstance(n, (int, np.integer)) for n in shape[2:])


def _turned(tensor: gs.Tensor) -> gs.Tensor | None:
    """x when the tensor is (-x[1], x[0], -x[3], x[2], ...) along the last axis."""
    joined = _input(_input(tensor, "Reshape"), None)
    if joined is None or joined.op != "Concat" or len(joined.inputs) != 2:
        return None
    if joined.attrs.get("axis") not in (-1, len(joined.outputs[0].shape or ()) - 1):
        return None
    first, second = (_input(item, "Unsqueeze") for item in joined.inputs)
    negated = _input(first, "Neg") if first is not None else None
    if negated is None or second is None:
        return None
    odd, even = _half(negated, 1), _half(second, 0)
    return odd if odd is not None and odd is even else None


def _half(tensor: gs.Tensor, index: int) -> gs.Tensor | None:
    """x when the tensor is x[..., index::2], by way of a last axis of two."""
    cut = _input(_input(tensor, "Squeeze"), None)
    if cut is None or cut.op != "Slice" or len(cut.inputs) < 4 or len(cut.inputs) > 5:
        return None
    pairs = producer(cut.inputs[0])
    shape = cut.inputs[0].shape
    if pairs is None or pairs.op != "Reshape" or shape is None or shape[-1] != 2:
        return None
    start, end, axis = (array_of(item) for item in cut.inputs[1:4])
    if start is None or end is None or axis is None or int(axis[0]) not in (-1, len(shape) - 1):
        return None
    before: gs.Tensor = pairs.inputs[0]
    whole = (
        before.shape is not None and len(before.shape) == len(shape) - 1 and before.shape[-1] == 2 * shape[-2]
    )
    taken = int(start[0]) == index and (int(end[0]) == index + 1 or (index == 1 and int(end[0]) >= 2))
    return before if whole and taken else None


def _input(tensor: gs.Tensor | None, op: str | None) -> gs.Tensor | gs.Node | None:
    """The first input of the tensor's node when that is an `op`; with op None, the node itself."""
    node = producer(tensor) if tensor is not None else None
    if node is None or op is None:
        return node
    return node.inputs[0] if node.op == op else None


def _table(tensor: gs.Tensor) -> gs.Tensor | None:
    """The table (tokens, size) that is seen as (1, tokens, 1, size), its values twice in a row."""
    shape = tensor.shape
    if shape is None or len(shape) != 4 or shape[0] != 1 or shape[2] != 1:
        return None
    if dtype_of(tensor) != TensorProto.FLOAT:
        return None
    current = tensor
    while (node := producer(current)) is not None and node.op in ("Unsqueeze", "Slice"):
        if node.op == "Slice" and not _cuts_nothing(node):
            return None
        current = node.inputs[0]
    flat = current.shape is not None and len(current.shape) == 2 and current.shape[1] == shape[3]
    return current if flat and _twice(current) else None


def _cuts_nothing(node: gs.Node) -> bool:
    values = [array_of(item) for item in node.inputs[1:]]
    if any(value is None or value.size != 1 for value in values):
        return False
    start, end, *rest = (int(value.item()) for value in values if value is not None)
    return start == 0 and end == _END and (len(rest) < 2 or rest[1] == 1)


def _twice(tensor: gs.Tensor) -> bool:
    """Whether each value along the last axis stands there twice in a row."""
    node = producer(tensor)
    if node is None:
        return False
    if node.op == "Cast":
        return _twice(node.inputs[0])
    if node.op == "Concat" and node.attrs.get("axis") in (-1, len(tensor.shape or ()) - 1):
        return all(_twice(item) for item in node.inputs)
    spread = producer(node.inputs[0]) if node.op == "Reshape" else None
    if spread is None or spread.op != "Expand" or tensor.shape is None:
        return False
    single = producer(spread.inputs[0])
    before, after = spread.inputs[0].shape, spread.outputs[0].shape
    if single is None or single.op != "Unsqueeze" or before is None or after is None:
        return False
    return bool(before[-1] == 1 and after[-1] == 2 and tensor.shape[-1] == 2 * after[-2])


def _fuse(node: gs.Node, found: Rotation, new: Emitter, halves: dict[int, gs.Tensor]) -> list[gs.Node]:
    """The nodes that take the place of the sum."""
    heads, size = (int(n) for n in found.x.shape[2:])
    shape = list(found.x.shape)
    flat = new.constant("flat", np.array([0, 0, heads * size], np.int64))
    first = new.constant("first", np.zeros(1, np.int64))
    inputs = [_shaped(new, "Reshape", [found.x, flat], [*shape[:2], heads * size]), first]
    inputs += [_every_second(new, table, halves) for table in (found.cos, found.sin)]
    turned = _shaped(
        new, "RotaryEmbedding", inputs, [*shape[:2], heads * size], num_heads=heads, interleaved=1
    )
    new.nodes[-1].domain = MICROSOFT
    output = node.outputs[0]
    node.outputs.clear()
    new.emit_to("Reshape", [turned, new.constant("split", np.array([0, 0, heads, size], np.int64))], [output])
    return new.nodes


def _every_second(new: Emitter, table: gs.Tensor, halves: dict[int, gs.Tensor]) -> gs.Tensor:
    """The table without the doubles, made once."""
    if id(table) not in halves:
        numbers = {"start": 0, "end": _END, "axis": 1, "step": 2}
        inputs = [table, *(new.constant(k, np.array([v], np.int64)) for k, v in numbers.items())]
        halves[id(table)] = _shaped(new, "Slice", inputs, [table.shape[0], int(table.shape[1]) // 2])
    return halves[id(table)]


def _shaped(
    new: Emitter, op: str, inputs: list[gs.Tensor], shape: list[object], **attrs: object
) -> gs.Tensor:
    out = new.emit(op, inputs, np.dtype(np.float32), **attrs)
    out.shape = shape
    return out
