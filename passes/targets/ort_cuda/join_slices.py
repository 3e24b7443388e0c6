"""join-slices: a tensor that is cut along an axis and joined again is the tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import END, View, cut_of, is_op, number_of, producer


@dataclass(frozen=True)
class Joined:
    """What a Concat gives, and the tensor whose two parts it joins."""

    result: gs.Tensor
    whole: gs.Tensor


@register
@dataclass(frozen=True)
class JoinSlices(Pass):
    """Let the readers of two slices that are joined again read the tensor that was cut. Exact.

        before: Concat(x[:n], x[n:])        after: x

    n is the same constant for both, or the same size of the graph (the single-stream blocks of FLUX hand text and image
    on separately). Slices and join then have no reader and are left to remove-unused.

    Declines when: the slices do not meet, leave something out, or are along another axis; the join is an output.
    """

    name: ClassVar[str] = "join-slices"

    def run(self, graph: gs.Graph) -> PassResult:
        """Bypass the joins."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "joins")

    def match(self, node: gs.Node, view: View) -> Joined | str | None:
        """The tensor whose two parts the node joins."""
        if not is_op(node, "Concat") or len(node.inputs) != 2 or not node.outputs[0].outputs:
            return None
        first, second = (cut_of(producer(tensor)) for tensor in node.inputs)
        if first is None or second is None or first.x is not second.x:
            return None
        if not first.axis == second.axis == int(node.attrs["axis"]) % len(first.x.shape):
            return "the tensor is cut along another axis than the parts are joined"
        end = number_of(second.end)
        if number_of(first.start) != 0 or end is None or end < END:
            return "the slices leave out the start or the end"
        if not _same(first.end, second.start):
            return "the second slice does not begin where the first ends"
        if id(node.outputs[0]) in view.outputs:
            return "the join is an output"
        return Joined(node.outputs[0], first.x)

    def rewrite(self, found: Joined, edit: Edit) -> None:
        """The parts stay for others."""
        edit.replace_uses(found.result, found.whole)


def _same(left: gs.Tensor, right: gs.Tensor) -> bool:
    """Whether two tensors of one element hold the same number, and not one that counts from the end."""
    number = number_of(left)
    if number is not None:
        return number == number_of(right) and number >= 0
    return _viewed(left) is _viewed(right) and _is_size(_viewed(left))


def _viewed(tensor: gs.Tensor) -> gs.Tensor:
    """What a tensor of one element is a reshaped view of."""
    while (node := producer(tensor)) is not None and node.op in ("Reshape", "Squeeze", "Unsqueeze"):
        tensor = node.inputs[0]
    return tensor


def _is_size(tensor: gs.Tensor) -> bool:
    """Whether the number is a size, or made of sizes in a way that leaves it positive."""
    node = producer(tensor)
    if node is None:
        return False
    if node.op in ("Add", "Mul"):
        return all(_is_size(_viewed(item)) for item in node.inputs)
    return bool(node.op == "Shape")
