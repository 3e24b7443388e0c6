"""One graph or subgraph while fuse-qdq works on it, and the small steps that its rewrites are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from passes.graph.edit import Edit, drop_nodes
from passes.graph.grids import Grid, grid_of
from passes.graph.match import STANDARD, is_constant, is_op, producer
from passes.graph.movement import data_inputs, is_move, takes

BLOCK_QUANTIZERS = frozenset(
    {"TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"}
)
"""TensorRT's operators that quantize in blocks: equal ones on equal inputs are one, as with Q and DQ."""
_LINEAR_OPS = ("QuantizeLinear", "DequantizeLinear")
# What a compiler computes on quantized numbers, when the DQ is right at its inputs.
COMPUTES = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"})


@dataclass
class Part:
    """The nodes of one graph or body, by `id()` too; `edit` gives names, knows outputs and takes refusals.

    Nodes are added at the end and put in order by `settle`: a quantizer that moves crosses any number of others.
    """

    graph: gs.Graph
    edit: Edit
    members: set[int]

    @classmethod
    def of(cls, body: gs.Graph, edit: Edit) -> Part | None:
        """The part, or None when it quantizes nothing."""
        if not any(node.op in _LINEAR_OPS or node.op in BLOCK_QUANTIZERS for node in body.nodes):
            return None
        return cls(body, edit, {id(node) for node in body.nodes})

    def source(self, tensor: gs.Tensor) -> gs.Node | None:
        """The node of this part that computes a tensor."""
        node = producer(tensor)
        return node if node is not None and id(node) in self.members else None

    def activations(self, op: str) -> Iterator[tuple[gs.Node, Grid]]:
        """QuantizeLinear or DequantizeLinear of computed tensors, in order, with their grids."""
        for node in self.graph.nodes:
            if is_op(node, op) and not is_constant(node.inputs[0]):
                grid = grid_of(node)
                if grid is not None:
                    yield node, grid

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether a caller reads the tensor."""
        return id(tensor) in self.edit.view.outputs

    def can_move(self, node: gs.Node, grid: Grid) -> bool:
        """Whether ONNX lets this move work on data of the grid's quantized type."""
        return is_move(node) and takes(node.op, self.edit.view.opset, grid.dtype)

    def add(self, node: gs.Node) -> gs.Node:
        """Take a node in, at the end; `settle` puts it in its place."""
        self.graph.nodes.append(node)
        self.members.add(id(node))
        return node

    def quantizer(
        self, like: gs.Node, grid: Grid, name: str, source: gs.Tensor, output: gs.Tensor
    ) -> gs.Node:
        """A Q or DQ with the scale and attributes of `like`, along the axis of `grid`."""
        attrs = dict(like.attrs) | ({} if grid.axis is None else {"axis": grid.axis})
        return self.add(gs.Node(like.op, name, attrs, [source, *like.inputs[1:]], [output]))

    def replay(self, move: gs.Node, sources: Sequence[gs.Tensor], grid: Grid) -> list[gs.Tensor]:
        """A copy of a move that works on quantized `sources`; its outputs."""
        outputs = [
            gs.Variable(self.edit.names.fresh(f"{out.name}_quantized"), grid.dtype, out.shape)
            for out in move.outputs
        ]
        inputs = [*sources, *move.inputs[len(data_inputs(move)) :]]
        name = self.edit.names.fresh(f"{move.name}_quantized")
        self.add(gs.Node(move.op, name, dict(move.attrs), inputs, outputs))
        return outputs

    def settle(self) -> None:
        """Drop Q, DQ, casts and moves that nothing reads, and put every node after what it reads."""
        dead: set[int] = set()
        self.graph.nodes = list(_in_order(self.graph.nodes))
        for node in reversed(self.graph.nodes):
            used = any(
                self.is_output(t) or any(id(user) not in dead for user in t.outputs) for t in node.outputs
            )
            if not used and mergeable(node):
                dead.add(id(node))
        drop_nodes(self.graph, dead)
        self.members -= dead


def mergeable(node: gs.Node) -> bool:
    """Whether two nodes like this that read the same are one: quantizers, casts and moves."""
    if node.op in BLOCK_QUANTIZERS:
        return True
    return node.domain in STANDARD and (node.op in (*_LINEAR_OPS, "Cast") or is_move(node))


def _in_order(nodes: Sequence[gs.Node]) -> Iterator[gs.Node]:
    """The nodes in their order, each preceded by those that it, or a subgraph of it, waits for."""
    mine, done = {id(node) for node in nodes}, set[int]()
    for root in nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            sources = map(producer, _reads(node)) if id(node) not in done else ()
            missing = [s for s in sources if s is not None and id(s) in mine and id(s) not in done]
            if missing:
                stack += missing[::-1]
                continue
            stack.pop()
            if id(node) not in done:
                done.add(id(node))
                yield node


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _reads(inner)
            yield from value.outputs
