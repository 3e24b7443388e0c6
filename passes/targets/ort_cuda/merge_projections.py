"""merge-projections: products of one short sequence with several weights become one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, joined_rows
from passes.graph.match import (
    Projection,
    View,
    dims,
    is_op,
    is_recipe,
    is_token_product,
    projection,
    recipe_of_constant,
    sole_reader,
)
from passes.weights.recipe import constant


@register
@dataclass(frozen=True)
class MergeProjections(Pass):
    """Join projections of one short sequence to one with the joined weights and biases, and split the result.

        before: Add(MatMul(x, W1), b1), Add(MatMul(x, W2), b2), ...
        after:  Split(Add(MatMul(x, [W1 W2 ...]), [b1 b2 ...]))

    x is (batch, `short`, K): few tokens, such as those of the prompt, for which the queries, keys and values of joint
    attention cost more to start than to compute. Weights are constants [K, N], biases [N], each of the same N. Over the
    tokens of an image the Split would cost more than what it saves. Exact but for the order of the sums in the product.

    Declines when: the projection has no constant bias [N]; something else reads its product.
    """

    name: ClassVar[str] = "merge-projections"
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the products and sums of each x."""
        return Edit(graph).rewrite_groups(self.match, _groups, self.rewrite, "projections")

    def match(self, node: gs.Node, view: View) -> Projection | str | None:
        """The node as the product of a projection over few tokens."""
        if (
            not is_token_product(node)
            or node.inputs[0].shape[1] != self.short
            or not is_recipe(node.inputs[1])
        ):
            return None
        adds = (reader for reader in node.outputs[0].outputs if is_op(reader, "Add"))
        if not any(isinstance(tensor, gs.Constant) for total in adds for tensor in total.inputs):
            return None
        found = projection(sole_reader(node.outputs[0], view), view)
        if found is None or found.total is None:
            return "its bias is not a constant [channels], or something else reads the product without it"
        return found

    def rewrite(self, group: Sequence[Projection], edit: Edit) -> None:
        """One product and one sum; what the sums gave comes out of a Split."""
        first, new = group[0], edit.at(group[0].product)
        x, dtype = first.x, first.product.outputs[0].dtype
        # Weights [K, N] are joined along N, biases [N] one after another.
        turned, *others = (recipe_of_constant(item.weight).transpose((1, 0)) for item in group)
        recipes = turned.append(others).transpose((1, 0)), joined_rows(item.bias for item in group)
        weight, bias = (
            constant(new.names.fresh(f"{tensor.name}/joined"), recipe)
            for tensor, recipe in zip((first.weight, first.bias), recipes, strict=True)
        )
        shape = [*x.shape[:2], recipes[0].shape[1]]
        product = new.emit("MatMul", [x, weight], dtype, shape)
        total = new.emit("Add", [product, bias], dtype, shape)
        outputs = [output for item in group for output in edit.release(item.nodes[0])]
        edit.remove(*(item.product for item in group))
        new.emit_to("Split", [total], outputs, axis=2, num_outputs=len(outputs))


def _groups(found: Sequence[Projection]) -> Iterator[list[Projection]]:
    """Projections of one x with weights of one shape and type, where there are several."""
    groups: dict[tuple[object, ...], list[Projection]] = defaultdict(list)
    for item in found:
        groups[id(item.x), *dims(item.weight), str(item.weight.dtype)].append(item)
    yield from (group for group in groups.values() if len(group) > 1)
