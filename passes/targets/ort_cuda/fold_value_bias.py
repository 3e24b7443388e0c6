"""fold-value-bias: the bias of attention's values moves behind the output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Names, drop_nodes, rename_after, replace_uses
from passes.graph.match import output_ids, producer, recipe_of_constant, weight_recipe
from passes.targets.ort_cuda.flatten_attention import MICROSOFT
from passes.weights.recipe import Recipe, constant, dtype_of


class Biased(NamedTuple):
    """A sum with a constant bias [channels]: its node, the other summand and the bias."""

    node: gs.Node
    value: gs.Tensor
    bias: gs.Tensor


@register
@dataclass(frozen=True)
class FoldValueBias(Pass):
    """Leave out the bias of attention's values: the weights of a softmax add up to one, so it only moves the output.

    Fires on MultiHeadAttention whose values are the sum of a product and a constant bias, or a join of such along
    the tokens, and whose output nothing reads but products with constant weights, themselves with a bias (parts of
    the tokens may be cut out between). The bias behind becomes b + W v. Of several biases, that of the most tokens
    goes, and the others become their difference to it. Saves reading and writing the values once.

    Changes numbers: what is left out is no longer rounded to 16 bits on the way. The new biases are computed in
    float32 and rounded to the type of the old.
    """

    name: ClassVar[str] = "fold-value-bias"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens: of several biases, one of other tokens goes."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite biases; the sums that have none left go."""
        names, kept = Names(graph), output_ids(graph)
        dead: set[int] = set()
        changed = 0
        for part in walk(graph):
            for node in part.nodes:
                if node.op != "MultiHeadAttention" or node.domain != MICROSOFT or len(node.inputs) != 3:
                    continue
                sources, readers = list(_sources(node.inputs[2], kept)), list(_readers(node, kept))
                if not sources or not readers or None in sources or None in readers:
                    continue
                found = [s for s in sources if s]
                gone = self._fold(found, [r for r in readers if r], names)
                for source in found:  # what is left of them is no longer what their modules give
                    made = producer(source.value) if source is gone else source.node
                    rename_after(made, source.node, node, names, kept)
                dead.add(id(gone.node))
                changed += 1
        drop_nodes(graph, dead)
        return PassResult(changed, (f"{changed} biases",) if changed else ())

    def _fold(self, sources: list[Biased], readers: list[Biased], names: Names) -> Biased:
        """Rewrite the biases; return the sum that has none left."""
        gone = next((s for s in sources if self.short not in (s.value.shape or ())), sources[0])
        bias = recipe_of_constant(gone.bias).cast(TensorProto.FLOAT)
        for source in sources:
            if source is not gone:
                _replace(source, _less(recipe_of_constant(source.bias), bias), names)
        for reader in readers:
            weight = recipe_of_constant(reader.value.inputs[0].inputs[1]).transpose((1, 0))
            moved = recipe_of_constant(reader.bias).cast(TensorProto.FLOAT).reshape((reader.bias.shape[0], 1))
            negated = bias.reshape((weight.shape[1], 1)).multiply(Recipe.of_array(np.full(1, -1, np.float32)))
            _replace(reader, moved.subtract_product(weight, negated).reshape((weight.shape[0],)), names)
        replace_uses(gone.node.outputs[0], gone.value)
        return gone


def _sources(values: gs.Tensor, kept: set[int]) -> Iterator[Biased | None]:
    """The sums that values are made of; None where there is something else."""
    node = producer(values)
    if node is None or len(values.outputs) != 1 or id(values) in kept:
        yield None
    elif node.op == "Reshape":
        yield from _sources(node.inputs[0], kept)
    elif node.op == "Concat" and node.attrs.get("axis") == 1:
        for item in node.inputs:
            yield from _sources(item, kept)
    else:
        yield _biased(node)


def _readers(node: gs.Node, kept: set[int]) -> Iterator[Biased | None]:
    """The sums behind the products that read the output; None where something else does."""
    output = node.outputs[0]
    if id(output) in kept or not output.outputs:
        yield None
    for reader in output.outputs:
        if reader.op == "Slice" and reader.inputs[0] is output and _along_tokens(reader):
            yield from _readers(reader, kept)
        elif reader.op == "MatMul" and reader.inputs[0] is output and len(reader.outputs[0].outputs) == 1:
            found = _biased(reader.outputs[0].outputs[0])
            free = found is not None and found.value is reader.outputs[0] and id(found.value) not in kept
            yield found if free and _is_weight(reader.inputs[1]) else None
        else:
            yield None


def _along_tokens(node: gs.Node) -> bool:
    before, after = node.inputs[0].shape, node.outputs[0].shape
    return before is not None and after is not None and before[2] == after[2] and before[0] == after[0]


def _biased(node: gs.Node) -> Biased | None:
    """The node as a sum of a MatMul of three axes and a bias."""
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    for value, bias in (node.inputs, node.inputs[::-1]):
        product = producer(value)
        if (
            product is None
            or product.op != "MatMul"
            or len(value.shape or ()) != 3
            or len(value.outputs) != 1
        ):
            continue
        if isinstance(bias, gs.Constant) and len(bias.shape or ()) == 1 and weight_recipe(bias) is not None:
            return Biased(node, value, bias)
    return None


def _is_weight(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and weight_recipe(tensor) is not None


def _less(left: Recipe, right: Recipe) -> Recipe:
    """The difference of two vectors."""
    one = Recipe.of_array(np.ones((1, 1), np.float32))
    column = (left.shape[0], 1)
    wide = left.cast(TensorProto.FLOAT).reshape(column)
    return wide.subtract_product(right.reshape(column), one).reshape(left.shape)


def _replace(biased: Biased, recipe: Recipe, names: Names) -> None:
    """Give a sum another bias, rounded to the type of the one that it had (see keep-float32)."""
    recipe = recipe.cast(dtype_of(biased.bias) or recipe.dtype)
    index = next(i for i, tensor in enumerate(biased.node.inputs) if tensor is biased.bias)
    biased.node.inputs[index] = constant(names.fresh(f"{biased.bias.name}/with_values"), recipe)
