"""join-slices: a tensor that is cut along an axis and joined again is the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import replace_uses
from passes.graph.match import array_of, output_ids, producer


@register
@dataclass(frozen=True)
class JoinSlices(Pass):
    """Let the readers of Concat(x[:n], x[n:]) read x. Exact.

    Fires on two slices of one axis, from its start to n and from n to its end, where n is the same constant or the
    same number of the graph (the single-stream blocks of FLUX hand text and image on separately). Slices that then
    have no reader are left to remove-unused.
    """

    name: ClassVar[str] = "join-slices"

    def run(self, graph: gs.Graph) -> PassResult:
        """Bypass the joins."""
        kept, changed = output_ids(graph), 0
        for part in walk(graph):
            for node in part.nodes:
                if node.op != "Concat" or len(node.inputs) != 2 or id(node.outputs[0]) in kept:
                    continue
                whole = _whole(node)
                if whole is not None and node.outputs[0].outputs:
                    replace_uses(node.outputs[0], whole)
                    changed += 1
        return PassResult(changed, (f"{changed} joins",) if changed else ())


def _whole(node: gs.Node) -> gs.Tensor | None:
    """The tensor whose two parts the node joins."""
    first, second = (producer(tensor) for tensor in node.inputs)
    if first is None or second is None or first.op != "Slice" or second.op != "Slice":
        return None
    tensor: gs.Tensor = first.inputs[0]
    if second.inputs[0] is not tensor or tensor.shape is None:
        return None
    axis = int(node.attrs["axis"]) % len(tensor.shape)
    if not (_plain(first, axis) and _plain(second, axis)):
        return None
    start, end = array_of(first.inputs[1]), array_of(second.inputs[2])
    if start is None or end is None or start.item() != 0 or end.item() < np.iinfo(np.int32).max:
        return None
    return tensor if _same(first.inputs[2], second.inputs[1]) else None


def _plain(node: gs.Node, axis: int) -> bool:
    """Whether the slice takes every element along this axis alone."""
    if len(node.inputs) < 4 or len(node.inputs[0].shape or ()) <= axis:
        return False
    axes = array_of(node.inputs[3])
    steps = array_of(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    if axes is None or steps is None or axes.size != 1 or steps.size != 1:
        return False
    return int(axes.item()) % len(node.inputs[0].shape) == axis and int(steps.item()) == 1


def _same(left: gs.Tensor, right: gs.Tensor) -> bool:
    """Whether two tensors of one element hold the same number, and not one that counts from the end."""
    values = array_of(left), array_of(right)
    if values[0] is not None and values[1] is not None:
        return bool(values[0].item() == values[1].item() >= 0)
    return _number(left) is _number(right) and _counts(_number(left))


def _number(tensor: gs.Tensor) -> gs.Tensor:
    """What a tensor of one element is a reshaped view of."""
    while (node := producer(tensor)) is not None and node.op in ("Reshape", "Squeeze", "Unsqueeze"):
        tensor = node.inputs[0]
    return tensor


def _counts(tensor: gs.Tensor) -> bool:
    """Whether the number is a size, or made of sizes in a way that leaves it positive."""
    node = producer(tensor)
    if node is None:
        return False
    if node.op in ("Add", "Mul"):
        return all(_counts(_number(item)) for item in node.inputs)
    return bool(node.op == "Shape")
