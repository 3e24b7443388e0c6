"""merge-projections: products of one short sequence with several weights become one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, joined_rows, replace_groups
from passes.graph.match import output_ids, recipe_of_constant, weight_recipe
from passes.weights.recipe import constant, recipe_of


class Projection(NamedTuple):
    """MatMul(x, weight) + bias: the two nodes."""

    product: gs.Node
    sum: gs.Node

    @property
    def weight(self) -> gs.Tensor:
        """Constant, [K, N]."""
        return self.product.inputs[1]

    @property
    def bias(self) -> gs.Tensor:
        """Constant, [N]."""
        left, right = self.sum.inputs
        return left if right is self.product.outputs[0] else right


@register
@dataclass(frozen=True)
class MergeProjections(Pass):
    """Join MatMul(x, W) + b of one x to a product with the joined weights and one bias, and split the result.

    Fires where x is (batch, `short`, K): few tokens, such as those of the prompt, for which the queries, keys and
    values of joint attention cost more to start than to compute. Weights are constants [K, N], biases [N], each of
    the same N. Over the tokens of an image the Split would cost more than what it saves. Exact but for the order of
    the sums in the product.
    """

    name: ClassVar[str] = "merge-projections"
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the products and sums of each x."""
        names, kept = Names(graph), output_ids(graph)

        def merge(group: Sequence[Projection], new: dict[int, list[gs.Node]], dead: set[int]) -> None:
            new[id(group[0].product)] = _merge(group, Emitter(group[0].product, names))
            dead |= {id(node) for projection in group for node in projection}

        merged = replace_groups(graph, lambda part: self._groups(part, kept), merge)
        return PassResult(merged, (f"{merged} projections",) if merged else ())

    def _groups(self, graph: gs.Graph, kept: set[int]) -> Iterator[list[Projection]]:
        found: dict[tuple[object, ...], list[Projection]] = defaultdict(list)
        for node in graph.nodes:
            projection = _projection(node, kept)
            if projection is not None and node.inputs[0].shape[1] == self.short:
                weight = projection.weight
                found[id(node.inputs[0]), *weight.shape, str(weight.dtype)].append(projection)
        yield from (group for group in found.values() if len(group) > 1)


def _projection(node: gs.Node, kept: set[int]) -> Projection | None:
    """The node as the product of a projection over tokens."""
    if node.op != "MatMul" or len(node.inputs[0].shape or ()) != 3 or recipe_of(node.inputs[1]) is None:
        return None
    value = node.outputs[0]
    if len(node.inputs[1].shape) != 2 or len(value.outputs) != 1 or id(value) in kept:
        return None
    total = value.outputs[0]
    if total.op != "Add":
        return None
    found = Projection(node, total)
    fits = list(found.bias.shape or ()) == [node.inputs[1].shape[1]]
    return found if fits and weight_recipe(found.bias) is not None else None


def _merge(group: Sequence[Projection], new: Emitter) -> list[gs.Node]:
    """One product and one sum; what the sums gave comes out of a Split."""
    first = group[0]
    x, dtype = first.product.inputs[0], first.product.outputs[0].dtype
    turned, *others = (recipe_of_constant(p.weight).transpose((1, 0)) for p in group)
    weight = turned.append(others).transpose((1, 0))
    bias = joined_rows(p.bias for p in group)
    constants = [
        constant(new.names.fresh(f"{tensor.name}/joined"), recipe)
        for tensor, recipe in ((first.weight, weight), (first.bias, bias))
    ]
    product = new.emit("MatMul", [x, constants[0]], dtype)
    product.shape = [*x.shape[:2], weight.shape[1]]
    total = new.emit("Add", [product, constants[1]], dtype)
    total.shape = list(product.shape)
    outputs = [projection.sum.outputs[0] for projection in group]
    for projection in group:
        projection.sum.outputs.clear()
    new.emit_to("Split", [total], outputs, axis=2, num_outputs=len(outputs))
    return new.nodes
