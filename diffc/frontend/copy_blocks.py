"""Puts the blocks that a trace left out into its graph: copies of a traced one, proven to be what a trace gives.

The traced blocks of a run are numbered 0, 1 and 2, the last. The nodes of a block are a *segment*: from the first node
of its module to the first of the next one's. Copies of segment 1 go between it and segment 2, with paths renamed.

What a node reads is one of: a value of its own segment, a value of the segment before, a weight of its own block, or
something that all blocks share. The three segments must be equal in this, node by node; so a block is the same function
of its number in all of them, and since the modules that were left out equal these (`blocks.find_runs`), their segments
are, too. Segment 0 reads from outside the run what the others read of the segment before, and may have more nodes: they
make what all share. Segment 2 may have fewer: nobody reads some of what the last block could make. Where segments
are not equal nothing is stamped, and the caller traces the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain, pairwise
from typing import Any

import onnx_ir as ir

from diffc.frontend.blocks import Run
from diffc.frontend.names import SCOPES, module_of
from diffc.frontend.recipes import is_real


class StampError(Exception):
    """The traced blocks of a run are not copies of each other; says which node differs."""


@dataclass(frozen=True)
class _Segment:
    """The nodes of a traced block, and those behind it before the next."""

    block: str
    nodes: tuple[ir.Node, ...]

    @property
    def values(self) -> Iterator[ir.Value]:
        """What its nodes make."""
        return (value for node in self.nodes for value in node.outputs)


class _Read(Enum):
    """What a node reads: of its segment, of the one before, a weight of its block, or the same in all blocks."""

    OWN = auto()
    BEFORE = auto()
    WEIGHT = auto()
    SHARED = auto()


_Reads = tuple[_Read, ...]


@dataclass(frozen=True)
class _Pattern:
    """A proven segment 1, and what its nodes read. `after`: id() of a value of segment 0 -> its equal in 1."""

    run: Run
    nodes: tuple[ir.Node, ...]
    reads: tuple[_Reads, ...]
    after: Mapping[int, ir.Value]
    end: ir.Node


def stamp(model: ir.Model, runs: Sequence[Run]) -> None:
    """Add the blocks that `runs` leave out, nodes and weights, in place; linear in the nodes of the result.

    Node names are those of the exporter, so this comes before `name_graph`. Raises StampError, and has changed
    nothing, where the graph does not repeat itself.
    """
    graph = model.graph
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    patterns = [_prove(run, _segments(run, nodes, position)) for run in runs]
    for run in runs:
        _prove_weights(graph, run)
    _stamp_weights(graph, runs)
    for pattern in patterns:
        _stamp_nodes(graph, pattern)


def _segments(run: Run, nodes: Sequence[ir.Node], position: Mapping[int, int]) -> list[_Segment]:
    """The segments of a run. Raises StampError when nodes of its blocks are not in the blocks' order."""
    starts, ends = [], []
    for block in run.traced:
        inside = [position[id(n)] for n in nodes if _below(module_of(n), block)]
        if not inside:
            raise StampError(f"{block} has no nodes")
        starts.append(inside[0])
        ends.append(inside[-1] + 1)
    if any(end > start for end, start in zip(ends, starts[1:], strict=False)):
        raise StampError(f"the blocks of {run.path} do not follow each other")
    between = starts[2] - ends[1]  # what the network itself does behind a block
    slices = (*pairwise(starts), (starts[2], ends[2] + between))
    return [_Segment(block, tuple(nodes[a:b])) for block, (a, b) in zip(run.traced, slices, strict=True)]


def _below(path: str, block: str) -> bool:
    return path == block or path.startswith(f"{block}.")


def _prove(run: Run, segments: Sequence[_Segment]) -> _Pattern:
    """Segment 1 as a pattern. Raises StampError unless the segments are equal, and show only what blocks may."""
    first, one, last = segments
    # A constant is made by the first who reads it, and belongs to no block.
    constants = {id(node) for node in first.nodes if not node.inputs and not _is_private(node, first)}
    first = _Segment(first.block, tuple(node for node in first.nodes if id(node) not in constants))
    made = {id(value) for value in first.values}
    start = _Comparison(one.block, first.block, lambda v, w: id(v) in made and id(w) not in made)
    reads = {id(node): start.reads(node, other) for node, other in _pairs(one, first)}
    after = {id(start.same[id(value)]): value for value in one.values}

    end = _Comparison(one.block, last.block, lambda v, w: after.get(id(v)) is w)
    for other, node in _pairs(last, one):
        if end.reads(node, other) != reads[id(node)]:
            raise StampError(f"{node.name} and {other.name} ({node.op_type}) differ in what they read")
    pattern = _Pattern(run, one.nodes, tuple(reads.values()), after, last.nodes[0])
    _prove_readers(pattern, (first, one, last), end.same)
    return pattern


def _pairs(few: _Segment, many: _Segment) -> list[tuple[ir.Node, ir.Node]]:
    """Every node of `few` with its equal in `many`, whatever they read. Raises StampError when one has none.

    Order decides, from the end, where results are: constants, which are alike, come before what reads them.
    """
    rest = ((node, _described(node, many.block)) for node in reversed(many.nodes))
    pairs = []
    for node in reversed(few.nodes):
        own = _described(node, few.block)
        other = next((other for other, described in rest if described == own), None)
        if other is None:
            raise StampError(f"{node.name} ({node.op_type}) has no equal in {many.block}")
        pairs.append((node, other))
    return pairs[::-1]


def _is_private(node: ir.Node, segment: _Segment) -> bool:
    """Whether only nodes of the segment read what the node makes."""
    inside = {id(reader) for reader in segment.nodes}
    return all(id(reader) in inside for value in node.outputs for reader, _ in value.uses())


@dataclass
class _Comparison:
    """Of nodes of segment 1 and of another. `before` says whether two values are equals in the segments before."""

    block: str
    other: str
    before: Callable[[ir.Value, ir.Value], bool]
    same: dict[int, ir.Value] = field(default_factory=dict)
    """id() of a value of segment 1 -> its equal in the other."""

    def reads(self, node: ir.Node, other: ir.Node) -> _Reads:
        """What both read, in their blocks' terms; notes that they are equal. Raises StampError when they are not."""
        kinds = [self._read(v, w) for v, w in zip(node.inputs, other.inputs, strict=False)]
        if len(node.inputs) != len(other.inputs) or None in kinds:
            raise StampError(f"{node.name} and {other.name} ({node.op_type}) differ in what they read")
        self.same |= {id(v): w for v, w in zip(node.outputs, other.outputs, strict=True)}
        return tuple(kind for kind in kinds if kind is not None)

    def _read(self, value: ir.Value | None, other: ir.Value | None) -> _Read | None:
        if value is other:
            return _Read.SHARED
        if value is None or other is None:
            return None
        if id(value) in self.same:
            return _Read.OWN if self.same[id(value)] is other else None
        if value.is_initializer() and _below(str(value.name), self.block):
            return _Read.WEIGHT if _weight(value, self.block) == _weight(other, self.other) else None
        return _Read.BEFORE if self.before(value, other) else None


def _weight(value: ir.Value, block: str) -> Any:
    return value.is_initializer(), _relative(str(value.name), block), value.dtype, str(value.shape)


def _prove_readers(pattern: _Pattern, segments: Sequence[_Segment], last: Mapping[int, ir.Value]) -> None:
    """Raise StampError when others read of segment 0 what is not shared, of 1 anything, of the last what is no end.

    `last` is id() of a value of segment 1 -> its equal in the last.
    """
    shown = set[int]()
    for node, kinds in zip(pattern.nodes, pattern.reads, strict=True):
        for value, kind in zip(node.inputs, kinds, strict=True):
            if kind is _Read.SHARED:
                shown.add(id(value))
            elif kind is _Read.BEFORE and id(value) not in pattern.after:
                raise StampError(f"{node.name} ({node.op_type}) reads what {pattern.run.path} makes once")
            elif kind is _Read.BEFORE:
                shown.add(id(last.get(id(pattern.after[id(value)]))))
    inside = {id(node) for segment in segments for node in segment.nodes}
    for value in chain.from_iterable(segment.values for segment in segments):
        outside = [reader.name for reader, _ in value.uses() if id(reader) not in inside]
        if id(value) not in shown and (outside or value.is_graph_output()):
            raise StampError(f"{value.name} inside {pattern.run.path} is read by {outside or 'the caller'}")


def _relative(path: str, block: str) -> str:
    """A path with the block's own replaced by a mark that no path has."""
    return f"*{path.removeprefix(block)}" if _below(path, block) else path


def _described(node: ir.Node, block: str) -> Any:
    """What decides what a node computes, but for its inputs, in terms of its block."""
    return (
        (node.domain, node.op_type, node.overload, node.version),
        _relative(module_of(node), block),
        {name: _plain(value) for name, value in node.attributes.items()},
        [(value.type, str(value.shape)) for value in node.outputs],
    )


def _scopes(node: ir.Node, block: str, path: str) -> str:
    """The module scopes of a node with the path of its block replaced."""
    scopes = node.metadata_props.get(SCOPES, "")
    return scopes.replace(f"'{block}'", f"'{path}'").replace(f"'{block}.", f"'{path}.")


def _plain(attribute: ir.Attr) -> Any:
    """An attribute as something that compares by value. Raises StampError for a body."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise StampError("a node of a block has a body")
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return (tensor.dtype, str(tensor.shape), tensor.tobytes())
    return (attribute.type, attribute.value)


def _prove_weights(graph: ir.Graph, run: Run) -> None:
    """Raise StampError when a block holds values of its own that no file has."""
    for name, value in graph.initializers.items():
        if _below(name, run.traced[1]) and is_real(value):
            raise StampError(f"the values of {name} are the trace's own")


def _stamp_weights(graph: ir.Graph, runs: Sequence[Run]) -> None:
    """Add the initializers of the blocks left out, where a trace of all blocks has them: block by block."""
    values: list[ir.Value] = []
    group: list[ir.Value] = []
    source = {run.traced[1]: run for run in runs}
    of = {name: next((b for b in source if _below(name, b)), None) for name in graph.initializers}
    current: str | None = None
    for name, value in (*graph.initializers.items(), ("", None)):
        block = of.get(name)
        if current is not None and block != current:
            for path in source[current].left_out:
                values += [_like(weight, path + str(weight.name).removeprefix(current)) for weight in group]
            group = []
        current = block
        if value is not None:
            values.append(value)
            group += [value] if block is not None else []
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)


def _like(value: ir.Value, name: str | None) -> ir.Value:
    """A value of the same type and shape; an initializer's is a placeholder that `attach_recipes` replaces."""
    shape = None if value.shape is None else ir.Shape(value.shape)
    return ir.Value(name=name, shape=shape, type=value.type, const_value=value.const_value)


def _stamp_nodes(graph: ir.Graph, pattern: _Pattern) -> None:
    """Insert the copies of segment 1, each reading the one before it, and let the last read the last copy."""
    block = pattern.run.traced[1]
    own = [value for node in pattern.nodes for value in node.outputs]
    inside = {id(node) for node in pattern.nodes}
    readers = [(n, i, value) for value in own for n, i in value.uses() if id(n) not in inside]
    previous, new = pattern.after, dict[int, ir.Value]()
    copies: list[ir.Node] = []
    for path in pattern.run.left_out:
        new = {id(value): _like(value, None) for value in own}
        sources = {_Read.OWN: new, _Read.BEFORE: previous}
        for node, kinds in zip(pattern.nodes, pattern.reads, strict=True):
            inputs: list[ir.Value | None] = []
            for value, kind in zip(node.inputs, kinds, strict=True):
                if value is not None and kind is _Read.WEIGHT:
                    inputs.append(graph.initializers[path + str(value.name).removeprefix(block)])
                else:
                    inputs.append(sources[kind][id(value)] if kind in sources else value)
            copies.append(
                _copy(node, inputs, [new[id(value)] for value in node.outputs], _scopes(node, block, path))
            )
        previous = {key: new[id(value)] for key, value in pattern.after.items()}
    for node, i, value in readers:
        node.replace_input_with(i, new[id(value)])
    graph.insert_before(pattern.end, copies)


def _copy(
    node: ir.Node, inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value], scopes: str
) -> ir.Node:
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes,
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        metadata_props={SCOPES: scopes},
    )
