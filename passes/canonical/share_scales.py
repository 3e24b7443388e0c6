"""share-scales: what is added or concatenated is quantized with one scale."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register
from passes.graph.edit import Edit
from passes.graph.grids import Grid, grid_of, small_values
from passes.graph.match import STANDARD, View, is_constant, producer
from passes.graph.movement import is_move

_PLACES = ("Add", "Concat")


@register
@dataclass(frozen=True)
class ShareScales(Pass):
    """Give the quantizers in front of a Concat or Add the largest of their scales. Changes numbers.

    Fires on an operator of `at` all of whose inputs are dequantized, per tensor, without zero point and of one type,
    directly or after moves of data, with scales that differ. Both nodes of each pair get the largest scale, so
    that nothing saturates that did not; pairs that meet in several places get one scale for all of them.

    With one scale the Concat or Add can work on quantized data, and fuse-qdq can let a pair after a Concat take
    the place of those before it. The steps of the other inputs become coarser, by the ratio of
    the scales with INT8; with FP8 only values near zero are rounded more.

        before: Add(DQ(Q(x, 0.1), 0.1), DQ(Q(y, 0.2), 0.2))      after: Add(DQ(Q(x, 0.2), 0.2), DQ(Q(y, 0.2), 0.2))

    Declines when: scales are per channel, in blocks or computed; the data is a weight; anything but DequantizeLinear
    with the same scale reads the quantized tensor.
    """

    name: ClassVar[str] = "share-scales"
    tolerance: ClassVar[float] = 0.1
    at: tuple[str, ...] = _PLACES

    def run(self, graph: gs.Graph) -> PassResult:
        """Collect what meets, then give each group its scale."""
        unknown = [op for op in self.at if op not in _PLACES]
        if unknown:
            raise PassError(f"share-scales knows no {unknown[0]!r}. Known: {', '.join(_PLACES)}")
        groups, edit = _Groups(), Edit(graph)
        for node in (node for part in edit.view.parts for node in part.nodes):
            if node.op in self.at and node.domain in STANDARD and (reason := _join(node, groups, edit.view)):
                edit.decline(node, reason)
        changed = sum(_share(pairs) for pairs in groups.all())
        return edit.finish({"quantizers got a larger scale": changed})


@dataclass(frozen=True)
class _Pair:
    """A QuantizeLinear and all DequantizeLinear nodes that read it, directly or after moves."""

    quantizer: gs.Node
    dequantizers: tuple[gs.Node, ...]
    grid: Grid
    scale: float


@dataclass
class _Groups:
    """Pairs that must have one scale (union-find over the `id()` of their quantizers)."""

    parent: dict[int, int] = field(default_factory=dict)
    pairs: dict[int, _Pair] = field(default_factory=dict)

    def join(self, pairs: Iterable[_Pair]) -> None:
        roots = []
        for pair in pairs:
            key = id(pair.quantizer)
            self.pairs.setdefault(key, pair)
            roots.append(self._root(key))
        for root in roots[1:]:
            self.parent[self._root(root)] = self._root(roots[0])

    def _root(self, key: int) -> int:
        while (above := self.parent.setdefault(key, key)) != key:
            self.parent[key] = self.parent.setdefault(above, above)
            key = above
        return key

    def all(self) -> list[list[_Pair]]:
        """The groups, in the order in which they were found."""
        found: dict[int, list[_Pair]] = {}
        for key, pair in self.pairs.items():
            found.setdefault(self._root(key), []).append(pair)
        return list(found.values())


def _join(node: gs.Node, groups: _Groups, view: View) -> str:
    """Put the pairs in front of `node` into one group; why not, or nothing."""
    makers = [_maker(tensor, "DequantizeLinear") for tensor in node.inputs]
    dequantizers = [maker for maker in makers if maker is not None]
    if len(dequantizers) < len(makers):
        return ""
    grids = [grid_of(dq) for dq in dequantizers]
    if len(set(grids)) == 1 and grids[0] is not None:
        known = [_pair(dq, view) for dq in dequantizers]
        groups.join(pair for pair in known if isinstance(pair, _Pair))
        return ""
    pairs = list[_Pair]()
    for dq in dequantizers:
        pair = _pair(dq, view)
        if isinstance(pair, str):
            return pair
        pairs.append(pair)
    if len({(pair.grid.dtype, pair.grid.wide) for pair in pairs}) > 1:
        return "its inputs are quantized to different types"
    groups.join(pairs)
    return ""


def _maker(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The `op` that computes a tensor, before moves of data; None when it is another operator."""
    node = producer(tensor)
    while node is not None and is_move(node) and node.op != "Concat":
        node = producer(node.inputs[0])
    return node if node is not None and node.op == op else None


def _pair(dequantizer: gs.Node, view: View) -> _Pair | str:
    """The pair that a DequantizeLinear belongs to, or why it has to keep its scale."""
    grid, values = grid_of(dequantizer), small_values(dequantizer.inputs[1])
    if grid is None or grid.axis is not None or grid.zero or values is None:
        return f"the scale of {dequantizer.name!r} is not one known number, or it has a zero point"
    node = _maker(dequantizer.inputs[0], "QuantizeLinear")
    if node is None or is_constant(node.inputs[0]):
        return f"what {dequantizer.name!r} reads is not quantized in the graph"
    readers = _readers(node.outputs[0], view)
    if readers is None or any(grid_of(reader) != grid for reader in (node, *readers)):
        return f"what {node.name!r} makes is read with another scale, or quantized"
    return _Pair(node, tuple(readers), grid, float(values.reshape(())))


def _readers(tensor: gs.Tensor, view: View) -> list[gs.Node] | None:
    """The DequantizeLinear nodes that read a quantized tensor, directly or after moves; None when others read it."""
    found, pending = list[gs.Node](), [tensor]
    while pending:
        current = pending.pop()
        if id(current) in view.outputs:
            return None
        for user in current.outputs:
            if is_move(user) and user.op != "Concat" and user.inputs[0] is current:
                pending += user.outputs
            elif user.op == "DequantizeLinear" and user.inputs[0] is current:
                found.append(user)
            else:
                return None
    return found


def _share(pairs: list[_Pair]) -> int:
    """Give all pairs the largest scale; how many quantizers changed."""
    largest = max(pairs, key=lambda pair: pair.scale)
    changed = 0
    for pair in pairs:
        if np.isfinite(pair.scale) and pair.scale < largest.scale:
            for node in (pair.quantizer, *pair.dequantizers):
                node.inputs[1] = largest.quantizer.inputs[1]
            changed += 1
    return changed
