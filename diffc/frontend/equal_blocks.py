"""Proves that the traced blocks of a run are the same function of their number, so that more can be copied from one.

The traced blocks of a run are numbered 0, 1 and 2, the last. To a block belong the nodes from the first node of its
module to the first node of the next block's module.

Every input of a node is one of four: a value of its own block, a value of the previous block, a weight of its own
block, or something that all blocks share. The three blocks must agree in this, node by node. The modules that were
left out of the trace equal the traced ones (`blocks.find_runs`), so their nodes would agree as well.

Two differences are allowed. Block 0 reads from outside the run what the others read from the previous block, and may
have more nodes: those that make what all blocks share. Block 2 may have fewer: nobody reads some of its results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import chain, pairwise
from typing import Any

import onnx_ir as ir

from diffc.frontend.blocks import Run
from diffc.frontend.names import module_of
from diffc.frontend.recipes import is_real


class BlocksDiffer(Exception):
    """The traced blocks of a run are not copies of each other; the message says which node differs."""


class Read(Enum):
    """Where a node's input comes from."""

    OWN = auto()
    PREVIOUS = auto()
    WEIGHT = auto()
    SHARED = auto()


Reads = tuple[Read, ...]


@dataclass(frozen=True)
class BlockPattern:
    """Block 1 of a run, proven to be what every block between the first and the last looks like.

    `nodes` are its nodes, `reads` says of each where its inputs come from. `following` maps the id() of a value of
    block 0 to its equal in block 1. `end` is the first node of block 2, before which copies belong.
    """

    run: Run
    nodes: tuple[ir.Node, ...]
    reads: tuple[Reads, ...]
    following: Mapping[int, ir.Value]
    end: ir.Node


def prove_blocks_equal(graph: ir.Graph, runs: Sequence[Run]) -> list[BlockPattern]:
    """The pattern of each run. Raises BlocksDiffer where the traced blocks of one are not equal."""
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    patterns = [_prove(run, _traced_blocks(run, nodes, position)) for run in runs]
    for run in runs:
        _prove_weights(graph, run)
    return patterns


def is_below(path: str, block: str) -> bool:
    """Whether a module or tensor at `path` is `block` itself or inside it."""
    return path == block or path.startswith(f"{block}.")


@dataclass(frozen=True)
class _TracedBlock:
    """The nodes of a traced block, and those between its module and the next block's."""

    path: str
    nodes: tuple[ir.Node, ...]

    @property
    def values(self) -> Iterator[ir.Value]:
        """The outputs of its nodes."""
        return (value for node in self.nodes for value in node.outputs)


def _traced_blocks(run: Run, nodes: Sequence[ir.Node], position: Mapping[int, int]) -> list[_TracedBlock]:
    """The traced blocks of a run. Raises BlocksDiffer when their nodes are not in the blocks' order."""
    starts, ends = [], []
    for block in run.traced:
        inside = [position[id(n)] for n in nodes if is_below(module_of(n), block)]
        if not inside:
            raise BlocksDiffer(f"{block} has no nodes")
        starts.append(inside[0])
        ends.append(inside[-1] + 1)
    if any(end > start for end, start in zip(ends, starts[1:], strict=False)):
        raise BlocksDiffer(f"the blocks of {run.path} do not follow each other")
    between = starts[2] - ends[1]  # nodes of the network itself, after a block
    slices = (*pairwise(starts), (starts[2], ends[2] + between))
    return [_TracedBlock(block, tuple(nodes[a:b])) for block, (a, b) in zip(run.traced, slices, strict=True)]


def _prove(run: Run, blocks: Sequence[_TracedBlock]) -> BlockPattern:
    """Block 1 as a pattern. Raises BlocksDiffer unless the blocks are equal and are read from outside as allowed."""
    first, one, last = blocks
    # A constant is made where it is first read; it belongs to no block.
    constants = {id(node) for node in first.nodes if not node.inputs and not _is_private(node, first)}
    first = _TracedBlock(first.path, tuple(node for node in first.nodes if id(node) not in constants))
    made = {id(value) for value in first.values}
    start = _Comparison(one.path, first.path, lambda v, w: id(v) in made and id(w) not in made)
    reads = {id(node): start.reads(node, other) for node, other in _pairs(one, first)}
    following = {id(start.equals[id(value)]): value for value in one.values}

    end = _Comparison(one.path, last.path, lambda v, w: following.get(id(v)) is w)
    for other, node in _pairs(last, one):
        if end.reads(node, other) != reads[id(node)]:
            raise _differ(node, other)
    pattern = BlockPattern(run, one.nodes, tuple(reads.values()), following, last.nodes[0])
    _prove_readers(pattern, (first, one, last), end.equals)
    return pattern


def _pairs(few: _TracedBlock, many: _TracedBlock) -> list[tuple[ir.Node, ir.Node]]:
    """Every node of `few` with its equal in `many`, whatever they read. Raises BlocksDiffer when one has none.

    Equal nodes are paired in order, from the end of the blocks: extra nodes come at their beginning.
    """
    rest = ((node, _described(node, many.path)) for node in reversed(many.nodes))
    pairs = []
    for node in reversed(few.nodes):
        own = _described(node, few.path)
        other = next((other for other, described in rest if described == own), None)
        if other is None:
            raise BlocksDiffer(f"{node.name} ({node.op_type}) has no equal in {many.path}")
        pairs.append((node, other))
    return pairs[::-1]


def _is_private(node: ir.Node, block: _TracedBlock) -> bool:
    """Whether only nodes of the block read the outputs of `node`."""
    inside = {id(reader) for reader in block.nodes}
    return all(id(reader) in inside for value in node.outputs for reader, _ in value.uses())


def _differ(node: ir.Node, other: ir.Node) -> BlocksDiffer:
    return BlocksDiffer(f"{node.name} and {other.name} ({node.op_type}) differ in what they read")


@dataclass
class _Comparison:
    """Compares nodes of block 1, in `path`, with those of another block, in `other`, in the order of the graph.

    `previous` says whether a value of block 1 and one of the other stand for the same value of their previous blocks.
    `equals` maps the id() of a value of block 1 to its equal in the other.
    """

    path: str
    other: str
    previous: Callable[[ir.Value, ir.Value], bool]
    equals: dict[int, ir.Value] = field(default_factory=dict)

    def reads(self, node: ir.Node, other: ir.Node) -> Reads:
        """Where the inputs of both come from; notes that their outputs are equal. Raises BlocksDiffer otherwise."""
        kinds = [self._read(v, w) for v, w in zip(node.inputs, other.inputs, strict=False)]
        if len(node.inputs) != len(other.inputs) or None in kinds:
            raise _differ(node, other)
        self.equals |= {id(v): w for v, w in zip(node.outputs, other.outputs, strict=True)}
        return tuple(kind for kind in kinds if kind is not None)

    def _read(self, value: ir.Value | None, other: ir.Value | None) -> Read | None:
        """Where two inputs come from; None when that is not the same place."""
        if value is other:
            return Read.SHARED
        if value is None or other is None:
            return None
        if id(value) in self.equals:
            return Read.OWN if self.equals[id(value)] is other else None
        if value.is_initializer() and is_below(str(value.name), self.path):
            return Read.WEIGHT if _weight(value, self.path) == _weight(other, self.other) else None
        return Read.PREVIOUS if self.previous(value, other) else None


def _weight(value: ir.Value, block: str) -> Any:
    """What must be equal of two weights: their names within their blocks, types and shapes."""
    return value.is_initializer(), _relative(str(value.name), block), value.dtype, str(value.shape)


def _prove_readers(
    pattern: BlockPattern, blocks: Sequence[_TracedBlock], in_last: Mapping[int, ir.Value]
) -> None:
    """Raise BlocksDiffer unless nodes outside the run read only what the pattern allows.

    Allowed are: shared values of block 0, nothing of block 1, and of block 2 the results that a next block would read.
    `in_last` maps the id() of a value of block 1 to its equal in block 2.
    """
    allowed = set[int]()
    for node, kinds in zip(pattern.nodes, pattern.reads, strict=True):
        for value, kind in zip(node.inputs, kinds, strict=True):
            if kind is Read.SHARED:
                allowed.add(id(value))
            elif kind is Read.PREVIOUS and id(value) not in pattern.following:
                raise BlocksDiffer(f"{node.name} ({node.op_type}) reads what {pattern.run.path} makes once")
            elif kind is Read.PREVIOUS:
                allowed.add(id(in_last.get(id(pattern.following[id(value)]))))
    inside = {id(node) for block in blocks for node in block.nodes}
    for value in chain.from_iterable(block.values for block in blocks):
        outside = [reader.name for reader, _ in value.uses() if id(reader) not in inside]
        if id(value) not in allowed and (outside or value.is_graph_output()):
            raise BlocksDiffer(f"{value.name} inside {pattern.run.path} is read by {outside or 'the caller'}")


def _prove_weights(graph: ir.Graph, run: Run) -> None:
    """Raise BlocksDiffer when block 1 has weights whose values are in the trace: of the others there are none."""
    for name, value in graph.initializers.items():
        if is_below(name, run.traced[1]) and is_real(value):
            raise BlocksDiffer(f"the values of {name} are the trace's own")


def _relative(path: str, block: str) -> str:
    """A path with the block's own replaced by a mark that no path has."""
    return f"*{path.removeprefix(block)}" if is_below(path, block) else path


def _described(node: ir.Node, block: str) -> Any:
    """Everything that decides what a node computes, except its inputs, in terms of its block."""
    return (
        (node.domain, node.op_type, node.overload, node.version),
        _relative(module_of(node), block),
        {name: _plain(value) for name, value in node.attributes.items()},
        [(value.type, str(value.shape)) for value in node.outputs],
    )


def _plain(attribute: ir.Attr) -> Any:
    """An attribute as something that compares by value. Raises BlocksDiffer for a body."""
    if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        raise BlocksDiffer("a node of a block has a body")
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return (tensor.dtype, str(tensor.shape), tensor.tobytes())
    return (attribute.type, attribute.value)
