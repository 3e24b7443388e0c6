"""Patterns of several nodes, read from the last node upwards, with the operands of Add and Mul in either order.

A pattern is written as the expression that it stands for: `Made("Add", Made("Mul", "normed", "scale"), "shift")`. A
string captures a tensor; where it stands twice, both must be the same tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType

import onnx_graphsurgeon as gs

from passes.graph.match import View, is_op, producer

_COMMUTE = ("Add", "Mul")


@dataclass(frozen=True)
class Match:
    """The tensors that a pattern captured, by name, and its last node with the `sole` ones: nothing else needs them."""

    tensors: Mapping[str, gs.Tensor] = field(default_factory=dict)
    nodes: tuple[gs.Node, ...] = ()

    def __getitem__(self, name: str) -> gs.Tensor:
        return self.tensors[name]

    def node(self, name: str) -> gs.Node:
        """The node that computes a captured tensor."""
        return self.tensors[name].inputs[0]

    def capture(self, name: str, tensor: gs.Tensor) -> Iterator[Match]:
        """This match with one more tensor, unless the name has another; itself without a name."""
        if not name:
            yield self
        elif self.tensors.get(name, tensor) is tensor:
            yield Match({**self.tensors, name: tensor}, self.nodes)


class Made:
    """A tensor that `op` of ONNX's own domain makes from `inputs`; a last input `...` stands for any others.

    `name` captures the tensor. `sole`: nothing else reads it. `optional`: where there is no such node, what its first
    input stands for may take its place.
    """

    def __init__(
        self,
        op: str,
        *inputs: Made | str | EllipsisType,
        name: str = "",
        sole: bool = False,
        optional: bool = False,
    ):
        self.op, self.inputs, self.name, self.sole, self.optional = op, inputs, name, sole, optional

    def matches(self, node: gs.Node, view: View) -> Iterator[Match]:
        """Every way in which the pattern fits when `node` is its last node. What reads that is not looked at."""
        if is_op(node, self.op):
            yield from self._from(node, node.outputs[0], view, Match(nodes=(node,)))

    def fits(self, tensor: gs.Tensor, view: View, found: Match) -> Iterator[Match]:
        """Every way in which the pattern fits a tensor, given what has been captured."""
        node = producer(tensor)
        if is_op(node, self.op) and (not self.sole or view.is_sole(tensor)):
            here = Match(found.tensors, (*found.nodes, node)) if self.sole else found
            yield from self._from(node, tensor, view, here)
        if self.optional:
            for match in _all_fit(self.inputs[:1], [tensor], view, found):
                yield from match.capture(self.name, tensor)

    def _from(self, node: gs.Node, tensor: gs.Tensor, view: View, found: Match) -> Iterator[Match]:
        orders = [node.inputs, node.inputs[::-1]] if node.op in _COMMUTE else [node.inputs]
        for inputs in orders:
            for match in _all_fit(self.inputs, inputs, view, found):
                yield from match.capture(self.name, tensor)


def _all_fit(
    patterns: Sequence[Made | str | EllipsisType], tensors: Sequence[gs.Tensor], view: View, found: Match
) -> Iterator[Match]:
    """Every way in which the patterns fit the tensors, one by one."""
    if not patterns or isinstance(patterns[0], EllipsisType):
        if patterns or not tensors:
            yield found
        return
    if not tensors:
        return
    first, tensor = patterns[0], tensors[0]
    ways = first.fits(tensor, view, found) if isinstance(first, Made) else found.capture(first, tensor)
    for match in ways:
        yield from _all_fit(patterns[1:], tensors[1:], view, match)
