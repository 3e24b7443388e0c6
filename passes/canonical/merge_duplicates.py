"""The first steps of fuse-qdq: equal nodes are one, and what is quantized already is not quantized again."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import onnx_graphsurgeon as gs

from passes.canonical.quantizer_part import Part, mergeable
from passes.graph.edit import replace_uses
from passes.graph.grids import Grid, grid_of, identity, survives_round_trip
from passes.graph.match import is_op
from passes.graph.movement import data_inputs, grid_before, size_ratio


def merge_duplicates(part: Part) -> int:
    """Let readers of a node's duplicate read the node itself; gives how many duplicates went."""
    first: dict[Any, gs.Node] = {}
    changed = 0
    for node in part.graph.nodes:
        if not mergeable(node) or any(part.is_output(t) for t in node.outputs):
            continue
        same = first.setdefault(_signature(node), node)
        if same is node:
            continue
        # Q(x, s) and Q(x, s)  ->  Q(x, s)
        for old, new in zip(node.outputs, same.outputs, strict=True):
            replace_uses(old, new)
        changed += 1
    if changed:
        part.settle()
    return changed


def _signature(node: gs.Node) -> Any:
    inputs = tuple("" if t.is_empty() else identity(t) for t in node.inputs)
    return node.op, node.domain, repr(sorted(node.attrs.items())), inputs, len(node.outputs)


def reuse_quantized(part: Part) -> int:
    """Let each Q read what is quantized already, in front of the moves that lead to it; how many Q went."""
    work = _Reuse(part)
    quantizers = [
        (q, grid) for q, grid in part.activations("QuantizeLinear") if not part.is_output(q.outputs[0])
    ]
    for q, grid in part.activations("QuantizeLinear"):
        work.ready.setdefault((id(q.inputs[0]), grid), q.outputs[0])
    created = work.create(quantizers)
    removed = 0
    for q, grid in quantizers + created:
        found = work.quantized(q.inputs[0], grid, q)
        if found is not None:
            # Q(Reshape(DQ(q, s)), s)  ->  Reshape(q)
            work.ready[id(q.inputs[0]), grid] = found
            replace_uses(q.outputs[0], found)
            removed += 1
    if removed:
        part.settle()
    return removed - len(created)


@dataclass
class _Branch:
    """Who wants one tensor quantized: how many readers, how many elements for each of the tensor's, and like what."""

    like: gs.Node
    readers: int = 0
    elements: Fraction = Fraction(0)
    direct: bool = False


@dataclass
class _Reuse:
    """Quantized tensors by the wide one and the grid, moves repeated so far, and who wants what."""

    part: Part
    ready: dict[tuple[int, Grid], gs.Tensor] = field(default_factory=dict)
    replayed: dict[tuple[int, Grid], list[gs.Tensor]] = field(default_factory=dict)
    wanted: dict[int, dict[Grid, _Branch]] = field(default_factory=dict)
    tensors: dict[int, gs.Tensor] = field(default_factory=dict)

    def create(self, quantizers: list[tuple[gs.Node, Grid]]) -> list[tuple[gs.Node, Grid]]:
        """A Q in front of moves whose results are all quantized alike. Returns the new ones."""
        made: list[tuple[gs.Node, Grid]] = []
        known = {id(q): grid for q, grid in quantizers}
        for node in reversed(self.part.graph.nodes):
            if id(node) in known:
                self._want(node.inputs[0], known[id(node)], node, Fraction(1), direct=True)
            for out in node.outputs:
                if id(out) not in self.wanted:
                    continue
                for grid, branch in self.wanted[id(out)].items():
                    made += self._create_at(out, grid, branch)
                    self._pass_on(node, out, grid, branch)
        for key, wanted in self.wanted.items():
            if self.part.source(self.tensors[key]) is None:
                for grid, branch in wanted.items():
                    made += self._create_at(self.tensors[key], grid, branch)
        return made

    def _want(
        self, tensor: gs.Tensor, grid: Grid, like: gs.Node, elements: Fraction, *, direct: bool = False
    ) -> None:
        self.tensors[id(tensor)] = tensor
        branch = self.wanted.setdefault(id(tensor), {}).setdefault(grid, _Branch(like))
        branch.readers += 1
        branch.elements += elements
        branch.direct |= direct

    def _pass_on(self, node: gs.Node, out: gs.Tensor, grid: Grid, branch: _Branch) -> None:
        """Say to the input of a move what its output is wanted as."""
        if not self.part.can_move(node, grid) or node.op == "Concat":
            return
        if (ahead := grid_before(node, grid)) is not None:
            share = min(branch.elements, Fraction(1)) * size_ratio(node, out)
            self._want(node.inputs[0], ahead, branch.like, share)

    def _create_at(self, tensor: gs.Tensor, grid: Grid, branch: _Branch) -> list[tuple[gs.Node, Grid]]:
        if branch.direct or branch.readers < 2 or branch.elements < 1:
            return []
        if (id(tensor), grid) in self.ready:
            return []
        names, like = self.part.edit.names, branch.like
        out = gs.Variable(names.fresh(f"{tensor.name}_quantized"), grid.dtype, tensor.shape)
        name = names.fresh(f"{like.name}_shared")
        q = self.part.quantizer(like, grid, name, tensor, out)
        self.ready[id(tensor), grid] = out
        return [(q, grid)]

    def quantized(self, tensor: gs.Tensor, grid: Grid, asking: gs.Node) -> gs.Tensor | None:
        """The tensor's values on `grid` when they can be had without a new Q."""
        found = self.ready.get((id(tensor), grid))
        if found is not None and found is not asking.outputs[0]:
            return found
        node = self.part.source(tensor)
        if is_op(node, "DequantizeLinear"):
            return self._dequantized(node, grid, asking)
        if node is None or not self.part.can_move(node, grid):
            return None
        if (id(node), grid) not in self.replayed:
            ahead = grid_before(node, grid)
            sources = [self.quantized(t, ahead, asking) for t in data_inputs(node)] if ahead else [None]
            narrow = [t for t in sources if t is not None]
            if len(narrow) < len(sources):
                return None
            self.replayed[id(node), grid] = self.part.replay(node, narrow, grid)
        index = next(i for i, t in enumerate(node.outputs) if t is tensor)
        return self.replayed[id(node), grid][index]

    def _dequantized(self, node: gs.Node, grid: Grid, asking: gs.Node) -> gs.Tensor | None:
        had = grid_of(node)
        if had == grid and survives_round_trip(node):
            return node.inputs[0]
        if had is not None and had.dtype == grid.dtype:
            same = "not every code comes back" if had == grid else "scales or zero points differ"
            self.part.edit.decline(asking, f"it quantizes again what {node.name!r} read: {same}")
        return None
