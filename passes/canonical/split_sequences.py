"""split-sequences: sequence operators become Split, wires and Concat (the RTX parser has no sequences)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Emitter, Names, drop_nodes, insert_before, replace_uses
from passes.graph.match import array_of, output_ids, producer
from passes.weights.recipe import Array


@register
@dataclass(frozen=True)
class SplitSequences(Pass):
    """Replace sequences of tensors whose parts are known by the tensors themselves.

    1. SplitToSequence without sizes -> Split into pieces of one; with one size -> Split into pieces of
       that size, the last one shorter; with a list of sizes, constant or not -> Split with that list.
       `keepdims=0` (only without sizes) adds a Squeeze to each piece.
    2. SequenceConstruct -> its inputs.
    3. SequenceAt with a constant index on 1 or 2 -> a wire to the piece; SequenceLength -> a constant.
    4. ConcatFromSequence on 1 or 2 -> Concat (with `new_axis=1` after an Unsqueeze of each piece).

        before: SequenceAt(SplitToSequence(x, 4), 1)      after: the second output of Split(x)

    Declines when: an index is not constant; the number of pieces is not known (a dynamic axis in equal pieces, a list
    of sizes of unknown length); another operator reads the sequence. Then all nodes on that sequence stay.
    """

    name: ClassVar[str] = "split-sequences"

    def run(self, graph: gs.Graph) -> PassResult:
        """Each sequence is replaced whole or not at all."""
        work = _Work(Names(graph), output_ids(graph))
        for part in walk(graph):
            work.new = {}
            for node in part.nodes:
                if node.op in ("SplitToSequence", "SequenceConstruct"):
                    work.visit(node)
            insert_before(part, work.new)
        drop_nodes(graph, work.dead)
        notes = (f"{work.changed} sequences replaced",) if work.changed else ()
        return PassResult(work.changed, notes, tuple(work.refusals))


class _CannotError(Exception):
    """Why a sequence must stay."""


@dataclass
class _Work:
    """One sweep: fresh names, what to insert where, what to drop, what was refused."""

    names: Names
    outputs: set[int]
    new: dict[int, list[gs.Node]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)
    changed: int = 0

    def visit(self, node: gs.Node) -> None:
        try:
            sizes = _sizes(node) if node.op == "SplitToSequence" else []
            count = len(sizes) or len(node.inputs)
            plan = [(user, _plan(user, count)) for user in self._users(node)]
        except _CannotError as reason:
            self.refusals.append(Refusal(node.name, str(reason)))
            return
        pieces = list(node.inputs)
        if node.op == "SplitToSequence":
            emitter = Emitter(node, self.names)
            pieces = _split(emitter, sizes)
            self.new[id(node)] = emitter.nodes
        for user, index in plan:
            self._rewire(user, index, pieces)
        self.dead |= {id(node), *(id(user) for user, _ in plan)}
        self.changed += 1

    def _users(self, node: gs.Node) -> list[gs.Node]:
        sequence = node.outputs[0]
        if id(sequence) in self.outputs:
            raise _CannotError(f"the sequence {sequence.name!r} is a graph output")
        return list(sequence.outputs)

    def _rewire(self, user: gs.Node, index: int, pieces: Sequence[gs.Tensor]) -> None:
        """Let the readers of `user` read the pieces; a graph output keeps its name through a node."""
        emitter, out = Emitter(user, self.names), user.outputs[0]
        if user.op == "ConcatFromSequence":
            _concat(emitter, pieces)
        elif user.op == "SequenceLength":
            length = emitter.constant("length", np.array(len(pieces), np.int64))
            emitter.emit_to("Identity", [length], [out])
        elif id(out) in self.outputs:
            emitter.emit_to("Identity", [pieces[index]], [out])
        else:
            replace_uses(out, pieces[index])
        self.new[id(user)] = emitter.nodes


def _plan(user: gs.Node, count: int) -> int:
    """The piece that a reader asks for (0 for readers of all). Raises _CannotError."""
    if user.op in ("ConcatFromSequence", "SequenceLength"):
        return 0
    if user.op != "SequenceAt":
        raise _CannotError(f"{user.op} node {user.name!r} reads the sequence")
    index = _constant(user.inputs[1])
    if index is None:
        raise _CannotError(f"the index of SequenceAt node {user.name!r} is not constant")
    position = int(index.reshape(()))
    if not -count <= position < count:
        raise _CannotError(f"SequenceAt node {user.name!r} asks for piece {position} of {count}")
    return position


def _constant(tensor: gs.Tensor) -> Array | None:
    """The values of an inline constant or of a tensor that a Constant node makes."""
    node = producer(tensor)
    if node is None or node.op != "Constant":
        return array_of(tensor)
    if "value_int" in node.attrs:
        return np.array(node.attrs["value_int"])
    return array_of(node.attrs["value"]) if "value" in node.attrs else None


def _sizes(node: gs.Node) -> list[int | None]:
    """The lengths of the pieces of a SplitToSequence, None where only run time knows. Raises _CannotError."""
    data, axis = node.inputs[0], node.attrs.get("axis", 0)
    sizes = np.array(1) if _is_unsized(node) else _constant(node.inputs[1])
    if sizes is None:
        return [None] * _length(node.inputs[1])
    if sizes.ndim == 1:
        return [int(size) for size in sizes]
    length = data.shape[axis] if data.shape is not None else None
    if not isinstance(length, (int, np.integer)):
        raise _CannotError(f"the length of axis {axis} of {data.name!r} is not known")
    step = int(sizes)
    return [min(step, int(length) - start) for start in range(0, int(length), step)]


def _is_unsized(node: gs.Node) -> bool:
    return len(node.inputs) == 1 or bool(node.inputs[1].is_empty())


def _length(sizes: gs.Tensor) -> int:
    """How many sizes a list holds that is computed at run time. Raises _CannotError."""
    if sizes.shape is None or len(sizes.shape) != 1 or not isinstance(sizes.shape[0], (int, np.integer)):
        raise _CannotError(f"the number of split sizes {sizes.name!r} is not known")
    return int(sizes.shape[0])


def _split(emitter: Emitter, sizes: Sequence[int | None]) -> list[gs.Tensor]:
    """A Split into `sizes`, then a Squeeze of each piece where the sequence had keepdims=0."""
    node = emitter.site
    data, axis = node.inputs[0], node.attrs.get("axis", 0)
    if len(sizes) == 1:
        pieces = [emitter.emit("Identity", [data], data.dtype)]
    else:
        lengths = node.inputs[1] if None in sizes else emitter.constant("sizes", np.array(sizes, np.int64))
        pieces = [_piece(emitter, data, axis, index, size) for index, size in enumerate(sizes)]
        emitter.emit_to("Split", [data, lengths], pieces, axis=axis)
    if node.attrs.get("keepdims", 1) or not _is_unsized(node):
        return pieces
    axes = emitter.constant("axes", np.array([axis], np.int64))
    return [emitter.emit("Squeeze", [piece, axes], data.dtype) for piece in pieces]


def _piece(emitter: Emitter, data: gs.Tensor, axis: int, index: int, size: int | None) -> gs.Variable:
    shape = None if data.shape is None else list(data.shape)
    if shape is not None:
        shape[axis] = size
    return gs.Variable(emitter.names.fresh(f"{emitter.site.name}/piece_{index}"), data.dtype, shape)


def _concat(emitter: Emitter, pieces: Sequence[gs.Tensor]) -> None:
    """Concat of the pieces in place of a ConcatFromSequence."""
    axis, out = emitter.site.attrs["axis"], emitter.site.outputs[0]
    if emitter.site.attrs.get("new_axis", 0):
        axes = emitter.constant("axes", np.array([axis], np.int64))
        pieces = [emitter.emit("Unsqueeze", [piece, axes], piece.dtype) for piece in pieces]
    emitter.emit_to("Concat", pieces, [out], axis=axis)
