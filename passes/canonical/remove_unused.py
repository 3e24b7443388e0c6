"""remove-unused: nodes and initializers that no output depends on, and doubled inline constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import drop_nodes, replace_uses
from passes.graph.match import array_of, output_ids
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
        live = _live(graph)
        dead = {id(node) for part in walk(graph) for node in part.nodes if id(node) not in live}
        drop_nodes(graph, dead)
        merged = _merge_constants(graph)
        changed = len(dead) + merged
        return PassResult(
            changed, (f"{len(dead)} nodes removed, {merged} constants merged",) if changed else ()
        )


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


def _merge_constants(graph: gs.Graph) -> int:
    """Let equal inline constants of a graph or body be one; gives how many went."""
    outputs, merged = output_ids(graph), 0
    for part in walk(graph):
        first: dict[tuple[int | None, tuple[int, ...], bytes], gs.Tensor] = {}
        for tensor in part.tensors().values():
            array = array_of(tensor)
            if array is None or id(tensor) in outputs:
                continue
            kept = first.setdefault((dtype_of(tensor), array.shape, array.tobytes()), tensor)
            if kept is not tensor:
                replace_uses(tensor, kept)
                merged += 1
    return merged
