"""Small helpers on graphsurgeon graphs that three or more passes need.

graphsurgeon keeps the consumers of a tensor in a list and finds entries by comparing nodes, so unlinking
nodes one by one costs the square of the fan-out. `drop_nodes` unlinks any number of them in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.base import walk
from passes.graph.match import recipe_of_constant
from passes.weights.recipe import Array, Recipe

T = TypeVar("T")


def inline_values(name: str, array: Array) -> LazyValues:
    """Values of a constant held in a TensorProto, which stores every ONNX type as ONNX wants it."""
    return LazyValues(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))


def inline(name: str, array: Array) -> gs.Constant:
    """A constant called `name` with its values in memory."""
    return gs.Constant(name, inline_values(name, array))


def joined_rows(tensors: Iterable[gs.Tensor]) -> Recipe:
    """The rows of constants that have recipes, one behind another."""
    first, *others = map(recipe_of_constant, tensors)
    return first.append(others)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of `old` read `new` (nodes only: graph outputs stay)."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def drop_nodes(graph: gs.Graph, dead: set[int]) -> None:
    """Remove the nodes whose `id()` is in `dead` from the graph and its subgraphs, in one linear sweep."""
    if not dead:
        return
    for part in walk(graph):
        gone = [node for node in part.nodes if id(node) in dead]
        for tensor in {id(t): t for node in gone for t in (*node.inputs, *node.outputs)}.values():
            for links in (tensor.inputs, tensor.outputs):
                list.__setitem__(links, slice(None), [node for node in links if id(node) not in dead])
        for node in gone:
            list.clear(node.inputs)
            list.clear(node.outputs)
        part.nodes = [node for node in part.nodes if id(node) not in dead]


def replace_chains(
    graph: gs.Graph, rewrite: Callable[[gs.Node], tuple[gs.Node, Sequence[gs.Node]] | None]
) -> int:
    """Let one node take the place of a chain, wherever `rewrite` finds one; return how many were replaced.

    `rewrite` is given each node as the last of a chain. It returns the new node, with its inputs and without
    outputs, and the other nodes of the chain, which nothing else may read; or None.
    """
    dead: set[int] = set()
    changed = 0
    for part in walk(graph):
        for index, node in enumerate(part.nodes):
            found = rewrite(node)
            if found is None:
                continue
            new, others = found
            outputs = list(node.outputs)
            node.outputs.clear()
            new.outputs.extend(outputs)
            part.nodes[index] = new
            dead |= {id(item) for item in (node, *others)}
            changed += 1
    drop_nodes(graph, dead)
    return changed


def insert_before(graph: gs.Graph, new: Mapping[int, Sequence[gs.Node]]) -> None:
    """Insert nodes in front of the node whose `id()` is the key, so that the order stays topological."""
    if new:
        graph.nodes = [item for node in graph.nodes for item in (*new.get(id(node), ()), node)]


def replace_groups(
    graph: gs.Graph,
    groups: Callable[[gs.Graph], Iterable[Sequence[T]]],
    merge: Callable[[Sequence[T], dict[int, list[gs.Node]], set[int]], None],
) -> int:
    """Let `merge` make one of each group that `groups` finds in a graph or subgraph; return how many took part.

    `merge` notes new nodes by the `id()` of the node that they come before, and the `id()` of those that go.
    """
    dead: set[int] = set()
    merged = 0
    for part in walk(graph):
        new: dict[int, list[gs.Node]] = {}
        for group in groups(part):
            merge(group, new, dead)
            merged += len(group)
        insert_before(part, new)
    drop_nodes(graph, dead)
    return merged


def replace_found(
    graph: gs.Graph,
    find: Callable[[gs.Node], T | None],
    replace: Callable[[T, dict[int, list[gs.Node]], set[int]], None],
) -> int:
    """Let `replace` write anew what `find` sees at a node, as `replace_groups` does one by one; return how many."""
    return replace_groups(
        graph,
        lambda part: ([found] for node in part.nodes if (found := find(node)) is not None),
        lambda group, new, dead: replace(group[0], new, dead),
    )


class Names:
    """Gives out tensor and node names that nothing in the graph has, the same ones in every run."""

    def __init__(self, graph: gs.Graph):
        self._taken = {
            item.name
            for part in walk(graph)
            for node in part.nodes
            for item in (node, *node.inputs, *node.outputs)
        }
        self._taken |= {tensor.name for part in walk(graph) for tensor in (*part.inputs, *part.outputs)}

    def fresh(self, wish: str) -> str:
        """`wish`, or `wish_2`, `wish_3` ... when that is taken."""
        name, number = wish, 1
        while name in self._taken:
            number += 1
            name = f"{wish}_{number}"
        self._taken.add(name)
        return name


def rename_after(made: gs.Node | None, total: gs.Node, owner: gs.Node, names: Names, kept: set[int]) -> None:
    """Call the value of `made`, whose sum with a bias, `total`, goes into `owner`, after the module of `owner`.

    Without its bias it is no longer what its own module gives, and validation compares modules by these names.
    """
    (module, slash, _), (taker, _, _) = total.name.partition("/"), owner.name.partition("/")
    if made is None or not slash or not made.name.startswith(f"{module}/") or id(made.outputs[0]) in kept:
        return
    made.outputs[0].name = names.fresh(f"{taker}/{made.op}_out")


class Emitter:
    """Builds the nodes that take the place of `site`: names derived from it, in order, in `nodes`."""

    def __init__(self, site: gs.Node, names: Names):
        self.site, self.names, self.nodes = site, names, list[gs.Node]()

    def constant(self, suffix: str, array: Array) -> gs.Constant:
        """An inline constant called after the site."""
        return inline(self.names.fresh(f"{self.site.name}/{suffix}"), array)

    def emit(self, op: str, inputs: Iterable[gs.Tensor], dtype: Any = None, **attrs: Any) -> gs.Tensor:
        """Append a node and return its new output."""
        out = gs.Variable(self.names.fresh(f"{self.site.name}/{op}_out"), dtype=dtype)
        self.emit_to(op, inputs, [out], **attrs)
        return out

    def reshape(self, tensor: gs.Tensor, shape: Sequence[int]) -> gs.Tensor:
        """The tensor with another shape, as Reshape takes it (-1 and 0 included)."""
        return self.emit("Reshape", [tensor, self.constant("shape", np.array(shape, np.int64))], tensor.dtype)

    def rows(self, tensor: gs.Tensor, count: int, width: int) -> list[gs.Tensor]:
        """The values of a tensor as `count` tensors (1, width), by one Split."""
        flat = self.reshape(tensor, [count, width])
        flat.shape = [count, width]
        parts: list[gs.Tensor] = [
            gs.Variable(self.names.fresh(f"{tensor.name}/row"), dtype=tensor.dtype, shape=[1, width])
            for _ in range(count)
        ]
        self.emit_to("Split", [flat], parts, axis=0, num_outputs=count)
        return parts

    def emit_to(
        self, op: str, inputs: Iterable[gs.Tensor], outputs: Iterable[gs.Tensor], **attrs: Any
    ) -> None:
        """Append a node with the given outputs (taken from the site, say)."""
        name = self.names.fresh(f"{self.site.name}/{op}")
        self.nodes.append(gs.Node(op, name, attrs=attrs, inputs=list(inputs), outputs=list(outputs)))
