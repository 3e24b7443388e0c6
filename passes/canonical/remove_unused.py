"""remove-unused: nodes and initializers that no output depends on, and doubled inline constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import array_of
from passes.weights.recipe import dtype_of


@register
@dataclass(frozen=True)
class RemoveUnused(Pass):
    """Remove what no output depends on.

    1. Node none of whose outputs leads to a graph output -> gone, with the initializers that only it read.
    2. Inline constants with the same type, shape and bytes -> one (the first keeps its name).

    What stays: inputs and outputs of the graph (callers feed and read them by name), recipes (refitting needs their
    names), unused outputs of a node that stays, functions.
    """

    name: ClassVar[str] = "remove-unused"

    def run(self, graph: gs.Graph) -> PassResult:
        """Walk back from the outputs; drop the rest in one sweep."""
        edit, live = Edit(graph), _live(graph)
        unused = [node for part in edit.view.parts for node in part.nodes if id(node) not in live]
        edit.remove(*unused)
        edit.apply()
        merged = _merge_constants(Edit(graph))
        changed = len(unused) + merged
        note = f"{len(unused)} nodes removed, {merged} constants merged"
        return PassResult(changed, (note,) if changed else ())


def _live(graph: gs.Graph) -> set[int]:
    """`id()` of every node that an output depends on, nodes of needed subgraphs included."""
    live: set[int] = set()
    todo = list(graph.outputs)
    while todo:
        for node in todo.pop().inputs:
            if id(node) not in live:
                live.add(id(node))
                todo.extend(node.inputs)
                for body in node.subgraphs():
                    todo.extend(body.outputs)
    return live


def _merge_constants(edit: Edit) -> int:
    """Let equal inline constants of a graph or body be one; gives how many went."""
    merged = 0
    for part in edit.view.parts:
        first: dict[tuple[int | None, tuple[int, ...], bytes], gs.Tensor] = {}
        for tensor in part.tensors().values():
            array = array_of(tensor)
            if array is None or id(tensor) in edit.view.outputs:
                continue
            same = first.setdefault((dtype_of(tensor), array.shape, array.tobytes()), tensor)
            if same is not tensor:
                edit.replace_uses(tensor, same)
                merged += 1
    return merged
