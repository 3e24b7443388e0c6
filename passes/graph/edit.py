"""Changes of a graph: fresh names, new nodes and their places, nodes that go. `Edit` collects, orders and applies them.

graphsurgeon keeps the consumers of a tensor in a list and finds entries by comparing nodes, so unlinking
nodes one by one costs the square of the fan-out. `drop_nodes` unlinks any number of them in one sweep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from passes.base import PassResult, Refusal, walk
from passes.graph.match import View, recipe_of_constant
from passes.weights.recipe import Array, Recipe

T = TypeVar("T")
U = TypeVar("U")


def inline_values(name: str, array: Array) -> LazyValues:
    """Values of a constant held in a TensorProto, which stores every ONNX type as ONNX wants it."""
    return LazyValues(onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))


def inline(name: str, array: Array) -> gs.Constant:
    """A constant called `name` with its values in memory."""
    return gs.Constant(name, inline_values(name, array))


def joined_rows(tensors: Iterable[gs.Tensor]) -> Recipe:
    """The rows of constants that have recipes, one after another."""
    first, *others = map(recipe_of_constant, tensors)
    return first.append(others)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let every consumer of `old` read `new` (nodes only: graph outputs stay)."""
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def replace_output(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let `node` give `new` in the place of `old`, which keeps its readers and has no producer then."""
    node.outputs[next(i for i, tensor in enumerate(node.outputs) if tensor is old)] = new


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


class Declined(Exception):
    """Why a pattern that is there must stay: what `match` of `Edit.rewrite_each` may raise from deep below."""


class Edit:
    """What a pass does to a graph and its subgraphs: collected while it looks, applied when it is done.

    Until then the graph's lists of nodes stay as they are, and so do the links of nodes that go: a pass that asks who
    reads a tensor sees the graph as it was, with the new nodes beside it.

    `made`: what one rewrite makes for those after it in the same graph or subgraph, by a key of the pass.
    """

    def __init__(self, graph: gs.Graph):
        self.view = View(graph)
        self.made: dict[Hashable, gs.Tensor] = {}
        self._graph = graph
        self._removed = set[int]()
        self._before: dict[int, list[gs.Node]] = defaultdict(list)
        self._after: dict[int, list[gs.Node]] = defaultdict(list)
        self._refusals: list[Refusal] = []

    @cached_property
    def names(self) -> Names:
        """Gives out names that nothing in the graph has."""
        return Names(self._graph)

    def at(self, place: gs.Node, named: gs.Node | None = None, *, after: bool = False) -> Emitter:
        """What emits nodes before (or after) the node `place` and names them by it, or by the node `named`."""
        inserted = self._after if after else self._before
        return Emitter(place if named is None else named, self.names, inserted[id(place)])

    def remove(self, *nodes: gs.Node) -> None:
        """Nodes that go. Their outputs must have no reader left but other nodes that go."""
        self._removed |= {id(node) for node in nodes}

    def release(self, node: gs.Node) -> list[gs.Tensor]:
        """The outputs of a node that goes, for others to compute in its place."""
        outputs = list(node.outputs)
        node.outputs.clear()
        self.remove(node)
        return outputs

    def replace_input(self, node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let one node read `new` in the first place of `old`."""
        node.inputs[next(i for i, tensor in enumerate(node.inputs) if tensor is old)] = new

    def replace_uses(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let every consumer of `old` read `new` (nodes only: graph outputs stay)."""
        replace_uses(old, new)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read a tensor and stay, one as often as it reads it."""
        return [node for node in tensor.outputs if id(node) not in self._removed]

    def decline(self, place: gs.Node | gs.Tensor, reason: str) -> None:
        """Say why a node, or a tensor, at which the pattern is there stays as it is."""
        self._refusals.append(Refusal(place.name, reason))

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Where the pass declined so far."""
        return tuple(self._refusals)

    def rename_after(self, value: gs.Tensor, total: gs.Node, owner: gs.Node) -> None:
        """Rename `value`, whose bias goes from `total` into `owner`, after the module of `owner`.

        Without its bias it is not what its own module gives. Validation compares values by the names of modules.
        """
        made = value.inputs[0] if value.inputs else None
        (module, slash, _), (taker, _, _) = total.name.partition("/"), owner.name.partition("/")
        if made is None or not slash or not made.name.startswith(f"{module}/"):
            return
        if id(made.outputs[0]) not in self.view.outputs:
            made.outputs[0].name = self.names.fresh(f"{taker}/{made.op}_out")

    def rewrite_each(
        self,
        match: Callable[[gs.Node, View], T | str | None],
        rewrite: Callable[[T, Edit], None],
        unit: str,
    ) -> PassResult:
        """Let `rewrite` write anew what `match` finds at a node, node by node, and apply the edit.

        `match` gives a reason, a str, where the pattern is there and must stay, or raises Declined with the reason.
        `unit`: what the note counts.
        """
        changed = 0
        for part in self.view.parts:
            self.made.clear()
            for node in part.nodes:
                found = self._found(match, node)
                if found is not None:
                    rewrite(found, self)
                    changed += 1
        return self.finish({unit: changed})

    def rewrite_groups(
        self,
        match: Callable[[gs.Node, View], T | str | None],
        group: Callable[[list[T]], Iterable[Sequence[U]]],
        rewrite: Callable[[Sequence[U], Edit], None],
        unit: str,
    ) -> PassResult:
        """Find all that `match` finds in a graph or subgraph, then let `rewrite` make one of each `group`."""
        changed = 0
        for part in self.view.parts:
            answers = [self._found(match, node) for node in part.nodes]
            for items in group([found for found in answers if found is not None]):
                rewrite(items, self)
                changed += len(items)
        return self.finish({unit: changed})

    def _found(self, match: Callable[[gs.Node, View], T | str | None], node: gs.Node) -> T | None:
        """What `match` finds at a node; None where it finds nothing, or says why the node stays."""
        try:
            found = match(node, self.view)
        except Declined as reason:
            found = str(reason)
        if not isinstance(found, str):
            return found
        self.decline(node, found)
        return None

    def finish(self, counts: Mapping[str, int]) -> PassResult:
        """Apply the edit; say of each kind of change how often it was made, and where the pass declined."""
        self.apply()
        notes = tuple(f"{count} {what}" for what, count in counts.items() if count)
        return PassResult(sum(counts.values()), notes, self.refusals)

    def apply(self) -> None:
        """Insert the new nodes and drop those that go."""
        for part in self.view.parts if self._before or self._after else ():
            part.nodes = [
                item
                for node in part.nodes
                for item in (*self._before.get(id(node), ()), node, *self._after.get(id(node), ()))
            ]
        drop_nodes(self._graph, self._removed)
        self._before.clear()
        self._after.clear()
        self._removed.clear()


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


class Emitter:
    """Builds nodes that are called after `site`, in order, in `nodes`."""

    def __init__(self, site: gs.Node, names: Names, nodes: list[gs.Node] | None = None):
        self.site, self.names = site, names
        self.nodes = list[gs.Node]() if nodes is None else nodes

    def constant(self, suffix: str, array: Array) -> gs.Constant:
        """An inline constant called after the site."""
        return inline(self.names.fresh(f"{self.site.name}/{suffix}"), array)

    def ints(self, suffix: str, *values: int) -> gs.Constant:
        """A constant vector of integers: a shape, axes or bounds."""
        return self.constant(suffix, np.array(values, np.int64))

    def emit(
        self,
        op: str,
        inputs: Iterable[gs.Tensor],
        dtype: Any = None,
        shape: Sequence[Any] | None = None,
        *,
        domain: str | None = None,
        **attrs: Any,
    ) -> gs.Tensor:
        """Append a node and return its new output, of that type and shape where they are given."""
        name = self.names.fresh(f"{self.site.name}/{op}_out")
        out = gs.Variable(name, dtype=dtype, shape=None if shape is None else list(shape))
        self.emit_to(op, inputs, [out], domain=domain, **attrs)
        return out

    def reshape(self, tensor: gs.Tensor, shape: Sequence[int]) -> gs.Tensor:
        """The tensor with another shape, as Reshape takes it (-1 and 0 included)."""
        return self.emit("Reshape", [tensor, self.ints("shape", *shape)], tensor.dtype)

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
        self,
        op: str,
        inputs: Iterable[gs.Tensor],
        outputs: Iterable[gs.Tensor],
        *,
        domain: str | None = None,
        **attrs: Any,
    ) -> None:
        """Append a node with the given outputs (see `Edit.release`)."""
        name = self.names.fresh(f"{self.site.name}/{op}")
        self.nodes.append(gs.Node(op, name, attrs, list(inputs), list(outputs), domain))
