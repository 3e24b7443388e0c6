"""split-cache: a graph that returns what blocks computed, or one that takes it and leaves the blocks out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register
from passes.cache.regions import Group, Kept, Regions
from passes.cache.segments import Chain, is_part
from passes.canonical.remove_unused import RemoveUnused
from passes.graph.edit import Edit, replace_output


@register
@dataclass(frozen=True)
class SplitCache(Pass):
    """Make of a backbone the model for one kind of denoising step (cache diffusion).

    `groups` are blocks by module path that share a decision, `output:path+path` or `residual:path+path`; `reuse`
    the numbers of the groups whose kept values this model takes.

    1. A tensor that leaves a group which runs -> also a graph output `cached_GROUP_INDEX`; with `residual`, less
       the input of the group that it adds to.
    2. A tensor that leaves a group in `reuse` -> a graph input of that name; with `residual`, plus the input of the
       group as it is in this step. What only led there is gone, weights and graph inputs included.
    3. `outputs`, where not empty, are the only kept tensors that are returned.
    4. `part` from 0 on -> that segment of the graph alone. In a chain the segments are the graph, and a step that uses
       a group again leaves its segments out: it takes the kept tensors `cached_GROUP_INDEX` from the step before, with
       `residual` what they are more than the group's input, and other crossing tensors (`flow_INDEX`) from the
       segments before. No weight is in two segments.

    Not where a group has no node, and not for a residual that is none (PassError). Integer arithmetic on sizes
    belongs to no group. For graphs before a target's own passes, which move quantizers over the borders.
    """

    name: ClassVar[str] = "split-cache"
    changes_interface: ClassVar[bool] = True
    groups: tuple[str, ...] = ()
    reuse: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ()
    part: int = -1

    @property
    def drops_outputs(self) -> bool:
        """A segment has its own outputs."""
        return self.part >= 0

    def run(self, graph: gs.Graph) -> PassResult:
        """Cut along the borders of `groups`; a second run finds its own tensors and changes nothing."""
        groups = [Group.parse(text) for text in self.groups]
        if unknown := [number for number in self.reuse if not 0 <= number < len(groups)]:
            raise PassError(
                f"reuse names group {unknown[0]}, and there are {len(groups)} (from 0)"
                ". Fix: give the numbers of groups that are there"
            )
        names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        if not groups or is_part(names):
            return PassResult()
        if self.part >= 0:
            return self._segment(graph, groups)
        kept = Regions(graph, groups).kept()
        taken = [item for item in kept if item.group in self.reuse]
        given = [item for item in kept if item.group not in self.reuse]
        given = [item for item in given if not self.outputs or item.name in self.outputs]
        edit = Edit(graph)
        for item in taken:
            _take(graph, item, edit)
        edit.apply()
        for item in given:
            _give(graph, item)
        gone = _prune(graph) if taken else 0
        note = f"{len(given)} kept tensors returned, {len(taken)} taken, {gone} nodes gone"
        return PassResult(len(taken) + len(given), (note,) if kept else ())

    def _segment(self, graph: gs.Graph, groups: Sequence[Group]) -> PassResult:
        if self.reuse or self.outputs:
            raise PassError(
                "a segment (part) has no reuse and no outputs: a chain runs or skips it"
                ". Fix: give one of the two"
            )
        before, chain = len(graph.nodes), Chain(graph, groups)
        chain.leave(self.part)
        note = f"segment {self.part} of {len(chain.segments)}, {len(graph.nodes)} of {before} nodes"
        return PassResult(before - len(graph.nodes), (note,))


def _give(graph: gs.Graph, item: Kept) -> None:
    """Return a kept tensor as an output of the graph: Identity(tensor), or Sub(tensor, source) for a residual."""
    out = gs.Variable(item.name, item.tensor.dtype, item.tensor.shape)
    if item.source is None:
        node = gs.Node("Identity", item.name, inputs=[item.tensor], outputs=[out])
    else:
        node = gs.Node("Sub", item.name, inputs=[item.tensor, item.source], outputs=[out])
    graph.nodes.append(node)
    graph.outputs.append(out)


def _take(graph: gs.Graph, item: Kept, edit: Edit) -> None:
    """Take a kept tensor as an input, in the place of the tensor that the group's blocks would make.

    before: tensor = Op(x)      after: unused = Op(x), tensor = Identity(input), or Add(source, input) for a residual
    """
    given = gs.Variable(item.name, item.tensor.dtype, item.tensor.shape)
    inputs = [given] if item.source is None else [item.source, given]
    maker = item.tensor.inputs[0]
    replace_output(
        maker, item.tensor, gs.Variable(f"{item.name}/unused", item.tensor.dtype, item.tensor.shape)
    )
    op = "Identity" if item.source is None else "Add"
    node = gs.Node(
        op, f"{item.name}/restore", {}, inputs, [item.tensor]
    )  # the tensor keeps its name and readers
    edit.at(maker, after=True).nodes.append(node)
    graph.inputs.append(given)


def _prune(graph: gs.Graph) -> int:
    """Drop what no output depends on: nodes, then graph inputs without a reader. Gives how many nodes went."""
    before = len(graph.nodes)
    RemoveUnused().run(graph)
    results = {id(tensor) for tensor in graph.outputs}
    graph.inputs = [tensor for tensor in graph.inputs if tensor.outputs or id(tensor) in results]
    return before - len(graph.nodes)
