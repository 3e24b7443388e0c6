"""split-sequences: sequence operators become Split, wires and Concat (the RTX parser has no sequences)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Declined, Edit, Emitter
from passes.graph.match import View, held_values


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
        return Edit(graph).rewrite_each(self.match, self.rewrite, "sequences replaced")

    def match(self, node: gs.Node, view: View) -> _Found | None:
        """A sequence of known parts with all that read it. Raises Declined where one of these needs the sequence."""
        if node.op not in ("SplitToSequence", "SequenceConstruct"):
            return None
        sizes = _sizes(node) if node.op == "SplitToSequence" else []
        sequence = node.outputs[0]
        if id(sequence) in view.outputs:
            raise Declined(f"the sequence {sequence.name!r} is a graph output")
        count = len(sizes if node.op == "SplitToSequence" else node.inputs)
        if not count:
            raise Declined("it has no pieces")
        return _Found(node, sizes, [(user, _piece_of(user, count)) for user in sequence.outputs])

    def rewrite(self, found: _Found, edit: Edit) -> None:
        """Give the parts to all that read the sequence."""
        node = found.node
        # SplitToSequence(x, sizes)  ->  Split(x, sizes);  SequenceConstruct(a, b)  ->  a, b
        pieces = list(node.inputs) if node.op == "SequenceConstruct" else _split(edit.at(node), found.sizes)
        edit.remove(node)
        for user, index in found.users:
            _rewire(user, index, pieces, edit)


@dataclass(frozen=True)
class _Found:
    """What makes a sequence, the lengths of its parts (of a split), and who reads it, each with the part it wants."""

    node: gs.Node
    sizes: Sequence[int | None]
    users: Sequence[tuple[gs.Node, int]]


def _rewire(user: gs.Node, index: int, pieces: Sequence[gs.Tensor], edit: Edit) -> None:
    """Let the readers of `user` read the pieces; a graph output keeps its name through a node."""
    new, out = edit.at(user), user.outputs[0]
    if user.op == "SequenceAt" and id(out) not in edit.view.outputs:
        # SequenceAt(sequence, i)  ->  piece i
        edit.replace_uses(out, pieces[index])
        edit.remove(user)
        return
    outputs = edit.release(user)
    if user.op == "ConcatFromSequence":
        _concat(new, pieces, outputs)
    elif user.op == "SequenceLength":
        # SequenceLength(sequence)  ->  the number
        length = new.constant("length", np.array(len(pieces), np.int64))
        new.emit_to("Identity", [length], outputs)
    else:
        new.emit_to("Identity", [pieces[index]], outputs)


def _piece_of(user: gs.Node, count: int) -> int:
    """The piece that a reader asks for (0 for readers of all). Raises Declined."""
    if user.op in ("ConcatFromSequence", "SequenceLength"):
        return 0
    if user.op != "SequenceAt":
        raise Declined(f"{user.op} node {user.name!r} reads the sequence")
    index = held_values(user.inputs[1])
    if index is None:
        raise Declined(f"the index of SequenceAt node {user.name!r} is not constant")
    position = int(index.reshape(()))
    if not -count <= position < count:
        raise Declined(f"SequenceAt node {user.name!r} asks for piece {position} of {count}")
    return position


def _sizes(node: gs.Node) -> list[int | None]:
    """The lengths of the pieces of a SplitToSequence, None where only run time knows. Raises Declined."""
    data, axis = node.inputs[0], node.attrs.get("axis", 0)
    sizes = np.array(1) if _is_unsized(node) else held_values(node.inputs[1])
    if sizes is None:
        return [None] * _length(node.inputs[1])
    if sizes.ndim == 1:
        return [int(size) for size in sizes]
    length = data.shape[axis] if data.shape is not None else None
    if not isinstance(length, (int, np.integer)):
        raise Declined(f"the length of axis {axis} of {data.name!r} is not known")
    step = int(sizes)
    return [min(step, int(length) - start) for start in range(0, int(length), step)]


def _is_unsized(node: gs.Node) -> bool:
    return len(node.inputs) == 1 or bool(node.inputs[1].is_empty())


def _length(sizes: gs.Tensor) -> int:
    """How many sizes a list holds that is computed at run time. Raises Declined."""
    if sizes.shape is None or len(sizes.shape) != 1 or not isinstance(sizes.shape[0], (int, np.integer)):
        raise Declined(f"the number of split sizes {sizes.name!r} is not known")
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
    axes = emitter.ints("axes", axis)
    return [emitter.emit("Squeeze", [piece, axes], data.dtype) for piece in pieces]


def _piece(emitter: Emitter, data: gs.Tensor, axis: int, index: int, size: int | None) -> gs.Variable:
    shape = None if data.shape is None else list(data.shape)
    if shape is not None:
        shape[axis] = size
    return gs.Variable(emitter.names.fresh(f"{emitter.site.name}/piece_{index}"), data.dtype, shape)


def _concat(emitter: Emitter, pieces: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> None:
    """ConcatFromSequence(sequence)  ->  Concat(pieces), each after an Unsqueeze where the axis is new"""
    axis = emitter.site.attrs["axis"]
    if emitter.site.attrs.get("new_axis", 0):
        axes = emitter.ints("axes", axis)
        pieces = [emitter.emit("Unsqueeze", [piece, axes], piece.dtype) for piece in pieces]
    emitter.emit_to("Concat", pieces, outputs, axis=axis)
