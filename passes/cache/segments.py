"""A graph as a chain of disjoint segments: run one after the other they are the graph, and no weight is in two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from passes.base import PassError
from passes.cache.regions import Group, Kept, Regions, is_bookkeeping
from passes.graph.edit import Edit
from passes.graph.match import producer

Place = tuple[int, int]
"""Where a node runs: level of the chain, and group (-1: in every step)."""
_ALWAYS = -1


@dataclass(frozen=True)
class Segment:
    """A model of the chain: the nodes that it has, by `id()`; `group` None runs in every step."""

    group: int | None
    nodes: frozenset[int]


class Chain:
    """The segments of `graph` in order, and what crosses from one to another.

    Every node is in the first segment that it can be in, and then as late as its readers allow: what modulates a late
    block is made there, and only the time embedding crosses. Arithmetic on sizes and on constants is in every segment
    that reads it. Crossing tensors get names: `cached_GROUP_INDEX` where a step without the group needs them,
    `flow_INDEX` else. Raises PassError where the graph cannot be cut.
    """

    def __init__(self, graph: gs.Graph, groups: Sequence[Group]):
        if any(list(node.subgraphs()) for node in graph.nodes):
            raise PassError(
                "a graph with subgraphs cannot be cut into segments. Fix: take the other cache layout"
            )
        self.graph = graph
        regions = Regions(graph, groups)
        numbers = {id(n): regions.group_of(n) for n in graph.nodes}
        self._colors = {node: _ALWAYS if number is None else number for node, number in numbers.items()}
        self._results = {id(tensor) for tensor in graph.outputs}
        self._floating = self._find_floating()
        places = self._sink(self._number())
        self.segments = [
            Segment(None if place[1] == _ALWAYS else place[1], self._members(place, places))
            for place in sorted(set(places.values()))
        ]
        kept = regions.kept()
        self.crossing = self._crossing()
        crossing = {id(tensor) for tensor in self.crossing} | self._results
        self.kept: list[Kept] = [item for item in kept if id(item.tensor) in crossing]
        self._name()

    def leave(self, number: int) -> None:
        """Make the graph the segment `number` of the chain."""
        if not 0 <= number < len(self.segments):
            raise PassError(
                f"there is no segment {number}: the chain has {len(self.segments)} (from 0)"
                ". Fix: give the number of one that is there"
            )
        graph, members = self.graph, self.segments[number].nodes
        nodes = [node for node in graph.nodes if id(node) in members]
        made = {id(t) for n in nodes if id(n) not in self._floating for t in n.outputs}
        inside = {id(t) for n in nodes for t in n.outputs}
        read = {id(t) for n in nodes for t in n.inputs}
        outputs = [t for t in graph.outputs if id(t) in made]
        outputs += [t for t in self.crossing if id(t) in made and id(t) not in self._results]
        inputs = [t for t in graph.inputs if id(t) in read]
        inputs += [t for t in self.crossing if id(t) in read and id(t) not in inside]
        edit = Edit(graph)
        edit.remove(*(node for node in graph.nodes if id(node) not in members))
        edit.apply()
        graph.inputs, graph.outputs = inputs, outputs

    def _find_floating(self) -> set[int]:
        """Nodes that every segment has of its own: arithmetic on sizes, and on constants."""
        known: set[int] = set()
        constant: set[int] = set()
        always: set[int] = set()
        for node in self.graph.nodes:
            if any(id(t) in self._results for t in node.outputs):
                continue
            if is_bookkeeping(node, known, always):
                known.add(id(node))
            elif all(m is not None and id(m) in constant for m in _makers(node)):
                constant.add(id(node))
            elif self._colors[id(node)] == _ALWAYS:
                always.add(id(node))
        return known | constant

    def _number(self) -> dict[int, Place]:
        """Levels: a node is in that of its makers where they share a group, one level above where not."""
        at: dict[int, Place | None] = {}
        for node in self.graph.nodes:
            color = self._colors[id(node)]
            makers = [place for m in _makers(node) if m is not None and (place := at[id(m)]) is not None]
            if id(node) in self._floating:
                at[id(node)] = max(makers, default=None)
            else:
                at[id(node)] = max((lv if c == color else lv + 1 for lv, c in makers), default=0), color
        return {n: place for n, place in at.items() if place is not None and n not in self._floating}

    def _sink(self, places: dict[int, Place]) -> dict[int, Place]:
        """Nodes whose readers are all of their own group move to the first of these."""
        for node in reversed(self.graph.nodes):
            if id(node) not in places or any(id(t) in self._results for t in node.outputs):
                continue
            readers = [places.get(id(reader)) for t in node.outputs for reader in t.outputs]
            there = [place for place in readers if place is not None and place[1] == places[id(node)][1]]
            if there and len(there) == len(readers):
                places[id(node)] = min(there)
        return places

    def _members(self, place: Place, places: dict[int, Place]) -> frozenset[int]:
        """The nodes of a place, and the floating ones that they read."""
        todo = [node for node in self.graph.nodes if places.get(id(node)) == place]
        found = {id(node) for node in todo}
        while todo:
            for maker in _makers(todo.pop()):
                if maker is not None and id(maker) in self._floating and id(maker) not in found:
                    found.add(id(maker))
                    todo.append(maker)
        return frozenset(found)

    def _crossing(self) -> list[gs.Tensor]:
        """Tensors that one segment gives another, in graph order."""
        wanted: set[int] = set()
        for segment in self.segments:
            for node in self.graph.nodes:
                if id(node) in segment.nodes:
                    makers = zip(_variables(node), _makers(node), strict=True)
                    wanted |= {id(t) for t, m in makers if m is not None and id(m) not in segment.nodes}
        return [t for node in self.graph.nodes for t in node.outputs if id(t) in wanted]

    def _name(self) -> None:
        names = {id(item.tensor): item.name for item in self.kept}
        others = [t for t in self.crossing if id(t) not in names]
        names |= {id(tensor): f"flow_{number}" for number, tensor in enumerate(others)}
        for tensor in self.crossing:
            if id(tensor) not in self._results:
                tensor.name = names[id(tensor)]


def _variables(node: gs.Node) -> list[gs.Tensor]:
    return [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]


def _makers(node: gs.Node) -> list[gs.Node | None]:
    """What makes each variable input of a node; None for inputs of the graph."""
    return [producer(tensor) for tensor in _variables(node)]


def is_part(names: Iterable[str]) -> bool:
    """Whether inputs and outputs of these names are those of a graph that was cut before."""
    return any(name.startswith(("cached_", "flow_")) for name in names)
