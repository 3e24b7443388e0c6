"""What of a graph belongs to a group of cached blocks, and which tensors cross its border."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from passes.base import PassError
from passes.graph.match import producer
from passes.weights.recipe import dtype_of

# What stands between a block's input and its output where the block adds to it.
_STREAM = ("Add", "Cast", "Clip", "Concat", "Identity", "Max", "Min", "Slice", "Split")
_INTEGERS = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)


@dataclass(frozen=True)
class Group:
    """Module paths whose nodes share a decision; `residual`: what they add to their input is kept."""

    blocks: tuple[str, ...]
    residual: bool

    @classmethod
    def parse(cls, text: str) -> Group:
        """`keep:block+block`, as an option of a pass writes it. Raises PassError for anything else."""
        keep, colon, blocks = text.partition(":")
        if keep not in ("output", "residual") or not colon or not blocks:
            raise PassError(f"group {text!r} is none. Expected: output:path+path or residual:path+path")
        return cls(tuple(blocks.split("+")), keep == "residual")

    def __str__(self) -> str:
        return f"{'residual' if self.residual else 'output'}:{'+'.join(self.blocks)}"


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept from step to step: `tensor`, or `tensor` - `source` where there is a source."""

    name: str
    group: int
    tensor: gs.Tensor
    source: gs.Tensor | None


class Regions:
    """Which group every node belongs to: that of the block whose module path begins the node's name.

    Integer arithmetic on sizes that every step knows belongs to no group: it costs nothing.
    """

    def __init__(self, graph: gs.Graph, groups: Sequence[Group]):
        self.graph, self.groups = graph, tuple(groups)
        self._blocks = {block: i for i, group in enumerate(groups) for block in group.blocks}
        self._of = self._assign()
        found = set(self._of.values())
        for number, group in enumerate(groups):
            if number not in found:
                raise PassError(
                    f"no node belongs to {group}. Blocks are module paths, which begin node names"
                    ". Fix: name blocks as torch does, such as transformer_blocks.0"
                )

    def group_of(self, node: gs.Node) -> int | None:
        """The number of the node's group; None for nodes that run in every step."""
        return self._of.get(id(node))

    def kept(self) -> list[Kept]:
        """The tensors that cross the border of a group outwards, in graph order, under the same names in every run.

        Raises PassError where a residual is to be kept and the tensor is not a sum of the group's input.
        """
        results = {id(tensor) for tensor in self.graph.outputs}
        kept, count = list[Kept](), [0] * len(self.groups)
        for node in self.graph.nodes:
            number = self.group_of(node)
            if number is None:
                continue
            for tensor in node.outputs:
                if id(tensor) in results or any(self.group_of(user) != number for user in tensor.outputs):
                    source = self._source(tensor, number) if self.groups[number].residual else None
                    kept.append(Kept(f"cached_{number}_{count[number]}", number, tensor, source))
                    count[number] += 1
        return kept

    def _assign(self) -> dict[int, int]:
        """The group of every node that has one, by the node's `id()`."""
        found: dict[int, int] = {}
        known: set[int] = set()
        always: set[int] = set()
        for node in self.graph.nodes:  # in topological order
            number = self._named(node)
            if is_bookkeeping(node, known, always):
                known.add(id(node))
            elif number is None:
                always.add(id(node))
            else:
                found[id(node)] = number
        return found

    def _named(self, node: gs.Node) -> int | None:
        """The group whose block is the node's module, or holds it."""
        parts = node.name.partition("/")[0].split(".")
        paths = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((self._blocks[path] for path in paths if path in self._blocks), None)

    def _source(self, tensor: gs.Tensor, number: int) -> gs.Tensor:
        """The input of the group that `tensor` is a sum of: found backwards along additions."""
        found: dict[int, gs.Tensor] = {}
        seen, todo = {id(tensor)}, [tensor]
        while todo:
            node = producer(todo.pop())
            for item in _data_inputs(node) if node is not None and node.op in _STREAM else ():
                if id(item) in seen or not isinstance(item, gs.Variable):
                    continue
                seen.add(id(item))
                maker = producer(item)
                if maker is not None and self.group_of(maker) == number:
                    todo.append(item)
                elif dtype_of(item) == dtype_of(tensor):
                    found[id(item)] = item
        sources = list(found.values())
        if len(sources) > 1:  # streams that are joined and parted again: shapes tell them apart
            sources = [s for s in sources if list(s.shape or ()) == list(tensor.shape or ())]
        if len(sources) != 1:
            raise PassError(
                f"{tensor.name!r} is not the sum of an input of its blocks and something else, so there is no residual"
                " to keep. Fix: keep the output"
            )
        return sources[0]


def _data_inputs(node: gs.Node) -> Iterable[gs.Tensor]:
    """The inputs of a node whose values go on; positions and limits are left out."""
    inputs: Iterable[gs.Tensor] = node.inputs if node.op in ("Add", "Concat") else node.inputs[:1]
    return inputs


def is_bookkeeping(node: gs.Node, known: set[int], runs_always: set[int]) -> bool:
    """Whether a node computes integers from sizes and constants alone.

    `known` are such nodes before it, `runs_always` other nodes that run in every step: their outputs have sizes.
    """
    if any(dtype_of(tensor) not in _INTEGERS for tensor in node.outputs) or list(node.subgraphs()):
        return False
    makers = [producer(t) for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
    there = known | runs_always if node.op == "Shape" else known
    return all(id(maker) in there or (maker is None and node.op == "Shape") for maker in makers)
