"""The last step of fuse-qdq: dequantizers move after moves of data, next to what computes on their result."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from passes.canonical.quantizer_part import COMPUTES, Part
from passes.graph.edit import drop_nodes, replace_output
from passes.graph.grids import Grid, grid_of
from passes.graph.match import STANDARD, is_constant, is_op
from passes.graph.movement import data_inputs, element_type, grid_after, grows, is_move


def sink_dequantizers(part: Part) -> int:
    """Move DQ, with their Q where nothing else reads it, after moves that lead to `COMPUTES`; how many moves."""
    leads = _leads_to_compute(part)
    changed = 0
    for node in list(part.graph.nodes):
        if not is_move(node) or not any(id(out) in leads for out in node.outputs):
            continue
        site = _Site.of(part, node)
        if site is not None and site.rewrite(part):
            changed += 1
    if changed:
        part.settle()
    return changed


def _leads_to_compute(part: Part) -> set[int]:
    """`id()` of the tensors that `COMPUTES` read, directly or after moves."""
    leads: set[int] = set()
    for node in reversed(part.graph.nodes):
        if node.op in COMPUTES and node.domain in STANDARD:
            leads |= {id(t) for t in node.inputs}
        elif is_move(node) and any(id(out) in leads for out in node.outputs):
            leads |= {id(t) for t in data_inputs(node)}
    return leads


@dataclass(frozen=True)
class _Site:
    """A move of dequantized data: its DQ nodes, one per moved input, their grid, and the grid after it."""

    move: gs.Node
    dequantizers: tuple[gs.Node, ...]
    ahead: Grid
    after: Grid

    @classmethod
    def of(cls, part: Part, move: gs.Node) -> _Site | None:
        """The site, or None where the move reads something else, or grids that do not go through."""
        found = []
        for tensor in data_inputs(move):
            node = part.source(tensor)
            if node is None or not is_op(node, "DequantizeLinear") or is_constant(node.inputs[0]):
                return None
            found.append((node, grid_of(node)))
        grid = found[0][1]
        after = None if grid is None else grid_after(move, grid)
        if grid is None or any(other != grid for _, other in found):
            part.edit.decline(move, "what it reads is dequantized with scales that differ")
            return None
        if after is None:
            part.edit.decline(move, "the scales would have to move along with the data")
            return None
        return cls(move, tuple(node for node, _ in found), grid, after)

    def rewrite(self, part: Part) -> bool:
        """Do it in the cheaper way; False, with a refusal, when there is none."""
        allowed, alone = part.can_move(self.move, self.ahead), self._quantizers(part)
        if alone and (not allowed or len(self._used(part)) == 1):
            self._move_pair(part, alone)
        elif allowed:
            self._move_dequantizer(part)
        else:
            kind = element_type(self.dequantizers[0].inputs[0])
            part.edit.decline(self.move, f"there is no {self.move.op} of {kind}")
            return False
        return True

    def _used(self, part: Part) -> list[gs.Tensor]:
        return [t for t in self.move.outputs if t.outputs or part.is_output(t)]

    def _quantizers(self, part: Part) -> tuple[gs.Node, ...]:
        """The Q of every DQ when nothing else reads either and moving wide data costs no more; otherwise none."""
        if grows(self.move):
            return ()
        found = []
        for node in self.dequantizers:
            q, wide, narrow = part.source(node.inputs[0]), node.outputs[0], node.inputs[0]
            if q is None or not is_op(q, "QuantizeLinear") or grid_of(q) != self.ahead:
                return ()
            view = part.edit.view
            if is_constant(q.inputs[0]) or not view.is_sole(wide) or not view.is_sole(narrow):
                return ()
            found.append(q)
        return tuple(found)

    def _move_pair(self, part: Part, quantizers: tuple[gs.Node, ...]) -> None:
        """Reshape(DQ(Q(x)))  ->  DQ(Q(Reshape(x)))"""
        q, dq = quantizers[0], self.dequantizers[0]
        used = self._used(part)
        for index, source in enumerate(quantizers):
            self.move.inputs[index] = source.inputs[0]
        for out in used:
            wide = gs.Variable(part.edit.names.fresh(f"{out.name}_wide"), out.dtype, out.shape)
            narrow = gs.Variable(part.edit.names.fresh(f"{out.name}_quantized"), self.ahead.dtype, out.shape)
            replace_output(self.move, out, wide)
            q_name, dq_name = (
                node.name if out is used[0] else part.edit.names.fresh(node.name) for node in (q, dq)
            )
            part.quantizer(q, self.after, q_name, wide, narrow)
            part.quantizer(dq, self.after, dq_name, narrow, out)
        _forget(part, (*quantizers, *self.dequantizers))

    def _move_dequantizer(self, part: Part) -> None:
        """Reshape(DQ(q))  ->  DQ(Reshape(q))"""
        dq = self.dequantizers[0]
        used = self._used(part)
        for index, node in enumerate(self.dequantizers):
            self.move.inputs[index] = node.inputs[0]
        free = not dq.outputs[0].outputs and not part.is_output(dq.outputs[0])
        for out in list(self.move.outputs):
            narrow = gs.Variable(part.edit.names.fresh(f"{out.name}_quantized"), self.ahead.dtype, out.shape)
            replace_output(self.move, out, narrow)
            if any(out is t for t in used):
                name = dq.name if free and out is used[0] else part.edit.names.fresh(dq.name)
                part.quantizer(dq, self.after, name, narrow, out)
        if free:
            _forget(part, (dq,))


def _forget(part: Part, nodes: tuple[gs.Node, ...]) -> None:
    """Unlink nodes whose names and outputs were given away; `settle` drops what is left of them."""
    dead = {id(node) for node in nodes}
    drop_nodes(part.graph, dead)
    part.members -= dead
