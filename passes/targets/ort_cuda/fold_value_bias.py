"""fold-value-bias: the bias of attention's values moves into the bias of the output projection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import (
    MICROSOFT,
    Projection,
    View,
    bias_add,
    cut_of,
    dims,
    is_op,
    is_weight,
    projection,
    recipe_of_constant,
    sole_producer,
    sole_reader,
)
from passes.weights.recipe import Recipe, constant, dtype_of


@dataclass(frozen=True)
class Biased:
    """The sum of a MatMul (batch, tokens, channels) and a constant bias [channels]."""

    total: gs.Node
    value: gs.Tensor
    bias: gs.Tensor


@dataclass(frozen=True)
class Values:
    """An attention, the sums that its values are made of, and the projections that read its output."""

    attention: gs.Node
    sources: list[Biased]
    readers: list[Projection]


@register
@dataclass(frozen=True)
class FoldValueBias(Pass):
    """Leave out the bias of attention's values: the weights of a softmax add up to one, so it only moves the output.

        before: Add(MatMul(MultiHeadAttention(q, k, Add(values, v)), W), b)
        after:  Add(MatMul(MultiHeadAttention(q, k, values), W), b + v W)

    The values may be a join of such sums along the tokens, and parts of the tokens may be cut out of the output. Of
    several biases, that of the most tokens goes, and the others become their difference to it. Saves reading and
    writing the values once.

    Declines when: the values are not such sums; something else reads the output than projections with constant weights
    and a bias [channels].

    Changes numbers: what is left out is not rounded any more to 16 bits on the way. The new biases are computed in
    float32 and rounded to the type of the old.
    """

    name: ClassVar[str] = "fold-value-bias"
    tolerance: ClassVar[float] = 1e-3
    short: str = "text"
    """What the graph calls an axis of few tokens: of several biases, one of other tokens goes."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite biases; the sums that have none left go."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "biases")

    def match(self, node: gs.Node, view: View) -> Values | str | None:
        """The node as an attention over values with a bias."""
        if not is_op(node, "MultiHeadAttention", domain=(MICROSOFT,)) or len(node.inputs) != 3:
            return None
        sources = list(_sources(node.inputs[2], view))
        if None in sources:
            return "its values are not sums of products and constant biases [channels]"
        readers = list(_readers(node.outputs[0], view))
        if None in readers:
            return "something else reads its output than projections with a constant bias [channels]"
        return Values(node, [s for s in sources if s], [r for r in readers if r])

    def rewrite(self, found: Values, edit: Edit) -> None:
        """The new biases; then the sum without one goes, and the sums and values get names of the attention."""
        many = (s for s in found.sources if self.short not in dims(s.value))
        gone = next(many, found.sources[0])
        bias = recipe_of_constant(gone.bias).cast(TensorProto.FLOAT)
        for source in found.sources:  # the values of other tokens keep what their bias has more
            if source is not gone:
                _replace(source.total, source.bias, _less(recipe_of_constant(source.bias), bias), edit)
        for reader in found.readers:  # b + v W
            _replace(reader.total, reader.bias, _with_values(reader, bias), edit)
        edit.replace_uses(gone.total.outputs[0], gone.value)
        edit.remove(gone.total)
        for source in found.sources:
            left = gone.value if source is gone else source.total.outputs[0]
            edit.rename_after(left, source.total, found.attention)


def _sources(values: gs.Tensor, view: View) -> Iterator[Biased | None]:
    """The sums that values are made of; None where there is something else."""
    node = sole_producer(values, view)
    if is_op(node, "Reshape"):
        yield from _sources(node.inputs[0], view)
    elif is_op(node, "Concat") and node.attrs.get("axis") == 1:
        for item in node.inputs:
            yield from _sources(item, view)
    else:
        found = bias_add(node)
        if (
            found is None
            or not is_weight(found[1])
            or not is_op(sole_producer(found[0], view), "MatMul", rank=3)
        ):
            yield None
        else:
            yield Biased(node, *found)


def _readers(output: gs.Tensor, view: View) -> Iterator[Projection | None]:
    """The projections with a bias that read a tensor, or tokens of it; None where something else does."""
    if id(output) in view.outputs or not output.outputs:
        yield None
    for reader in output.outputs:
        cut = cut_of(reader)
        if cut is not None and cut.x is output and cut.axis == 1:
            yield from _readers(reader.outputs[0], view)
        else:
            found = projection(sole_reader(reader.outputs[0], view), view)
            fits = found is not None and found.bias is not None and found.product is reader
            yield found if fits and reader.inputs[0] is output else None


def _with_values(reader: Projection, bias: Recipe) -> Recipe:
    """b + v W, by the operation that recipes have: b - W^T (-v)."""
    weight = recipe_of_constant(reader.weight).transpose((1, 0))
    channels, width = weight.shape
    negated = bias.reshape((width, 1)).multiply(Recipe.of_array(np.full(1, -1, np.float32)))
    moved = recipe_of_constant(reader.bias).cast(TensorProto.FLOAT).reshape((channels, 1))
    return moved.subtract_product(weight, negated).reshape((channels,))


def _less(left: Recipe, right: Recipe) -> Recipe:
    """The difference of two vectors."""
    one = Recipe.of_array(np.ones((1, 1), np.float32))
    column = (left.shape[0], 1)
    wide = left.cast(TensorProto.FLOAT).reshape(column)
    return wide.subtract_product(right.reshape(column), one).reshape(left.shape)


def _replace(total: gs.Node, bias: gs.Tensor, recipe: Recipe, edit: Edit) -> None:
    """Give a sum another bias, rounded to the type of the one that it had (see keep-float32)."""
    recipe = recipe.cast(dtype_of(bias) or recipe.dtype)
    edit.replace_input(total, bias, constant(edit.names.fresh(f"{bias.name}/with_values"), recipe))
