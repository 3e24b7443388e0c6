"""merge-modulations: the modulations of all blocks come from one product, and each step after it is one kernel."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, Emitter, joined_rows
from passes.graph.match import (
    Projection,
    View,
    array_of,
    cut_of,
    dims,
    is_op,
    is_recipe,
    number_of,
    producer,
    projection,
    sole_reader,
)
from passes.weights.recipe import Recipe, constant, dtype_of

_BY_VALUE = 32  # outputs whose addresses ONNX Runtime's CUDA Split hands to its kernel without a copy
_SAME = ("Sigmoid", "Mul", "Swish", "Cast")  # what a block computes of the embedding before its product


@dataclass(frozen=True)
class Modulation:
    """A product of the embedding, (batch, parts * channels), and the Split that takes it apart."""

    inner: Projection
    split: gs.Node

    @property
    def width(self) -> int:
        """Columns of the product."""
        return int(self.inner.weight.shape[0])


@dataclass(frozen=True)
class Shift:
    """A number that is added to one part of a modulation, as in 1 + scale."""

    total: gs.Node
    views: list[gs.Tensor]
    value: float


@register
@dataclass(frozen=True)
class MergeModulations(Pass):
    """Join the products that give scales, shifts and gates of every block: same input, weights W [N, K] one by one.

        before: Split(Gemm(x, W1, b1)), Split(Gemm(x, W2, b2)), ...
        after:  Split(one of Split(Gemm(x, [W1 W2 ...], [b1 b2 ...]))), ...
        before: Add(part, number)                           after: part, the number being added to the joined result
        before: Split(part of (batch, 1, channels)), ...    after: Unsqueeze(one of Split([batch * parts, channels]))

    x is the same for two or more products (each block of a diffusion transformer computes SiLU of the embedding anew).
    Weights of the same shape are joined along N, up to `most` values, and one Split gives each block its columns of the
    result. A number added to a part (1 + scale) is added to the joined result, with zero for the other parts. Where the
    batch is a number and parts are cut image by image, one Split makes the parts of all images.

    All of it is done on a few values, by many small kernels: this saves most of them. Exact but for the order of
    the sums in the product.

    Declines when: the product is scaled, its weights or bias [N] are not constants, or something else than a Split into
    equal parts reads it.
    """

    name: ClassVar[str] = "merge-modulations"
    most: int = 1 << 30

    def run(self, graph: gs.Graph) -> PassResult:
        """Join the products of each graph."""
        return Edit(graph).rewrite_groups(self.match, self.groups, self.rewrite, "products")

    def match(self, node: gs.Node, view: View) -> Modulation | str | None:
        """The node as a product that is split into equal parts."""
        split = sole_reader(node.outputs[0], view) if is_op(node, "Gemm", rank=2) else None
        if not is_op(split, "Split") or split.attrs.get("axis", 0) not in (1, -1):
            return None
        inner = projection(node, view, "Gemm")
        if inner is None or not is_recipe(inner.weight):
            return "it is not a plain product with constant weights [N, K] and a constant bias [N]"
        sizes = array_of(split.inputs[1]) if len(split.inputs) > 1 else np.zeros(1)
        if sizes is None or len(set(sizes.tolist())) != 1 or inner.weight.shape[0] % len(split.outputs):
            return "it is not split into equal parts"
        return Modulation(inner, split)

    def groups(self, found: Sequence[Modulation]) -> Iterator[list[Modulation]]:
        """Modulations of one input, in the order of the graph, as many at once as `most` allows."""
        groups: dict[Hashable, list[Modulation]] = defaultdict(list)
        for item in found:
            weight = item.inner.weight
            groups[_key(item.inner.x), str(weight.dtype), *weight.shape].append(item)
        for group in groups.values():
            most = max(1, min(_BY_VALUE, self.most // math.prod(group[0].inner.weight.shape)))
            size = math.ceil(len(group) / math.ceil(len(group) / most))
            pieces = (group[start : start + size] for start in range(0, len(group), size))
            yield from (piece for piece in pieces if len(piece) > 1)

    def rewrite(self, group: Sequence[Modulation], edit: Edit) -> None:
        """One product for the group, at the place of its first.

        New nodes are called after the modules that take modulations apart: what the products' own modules give is gone.
        """
        first, names = group[0].inner, edit.names
        new, x = edit.at(first.product, named=group[0].split), first.product.inputs[0]
        # rows of weights [N, K] and biases [N], one block after another
        weight, bias = (
            constant(names.fresh(f"{tensors[0].name}/joined"), joined_rows(tensors))
            for tensors in ([item.inner.product.inputs[index] for item in group] for index in (1, 2))
        )
        result, dtype = first.product.outputs[0], first.product.outputs[0].dtype
        shape = [result.shape[0], sum(item.width for item in group)]
        result = new.emit("Gemm", [x, weight, bias], dtype, shape, transB=1)
        result = _shifted(result, group, new, edit)
        # the columns of each block, for the Splits that were there
        columns = [
            gs.Variable(names.fresh(f"{item.split.name}/columns"), dtype, [shape[0], item.width])
            for item in group
        ]
        new.emit_to("Split", [result], columns, axis=1, num_outputs=len(columns))
        for item, mine in zip(group, columns, strict=True):
            item.split.inputs[0] = mine
            edit.remove(item.inner.product)
            _cut_images(item.split, edit)


def _key(tensor: gs.Tensor) -> Hashable:
    """Equal for tensors that are computed in the same way from the same one."""
    node = producer(tensor)
    if node is None or node.op not in _SAME:
        return id(tensor)
    return (node.op, node.domain, str(sorted(node.attrs.items())), *map(_key, node.inputs))


def _shifted(result: gs.Tensor, group: Sequence[Modulation], new: Emitter, edit: Edit) -> gs.Tensor:
    """The joined result with the numbers added that are added to its parts, which are not any more."""
    vector, start = np.zeros(sum(item.width for item in group), np.float32), 0
    for item in group:
        size = item.width // len(item.split.outputs)
        for output in item.split.outputs:
            shift = _shift_of(output, edit.view)
            if shift is not None:
                vector[start : start + size] = shift.value
                _take_over(shift, edit)
            start += size
    if not vector.any():
        return result
    recipe, name = Recipe.of_array(vector), new.names.fresh(f"{new.site.name}/numbers")
    numbers = constant(name, recipe.cast(dtype_of(result) or recipe.dtype))
    return new.emit("Add", [result, numbers], result.dtype, result.shape)


def _shift_of(part: gs.Tensor, view: View) -> Shift | None:
    """The sum of a part and a number, when nothing else reads the part or a view of it."""
    chain = [part, *_views(part, view)]
    last = chain[-1]
    node = sole_reader(last, view)
    if not is_op(node, "Add") or node.outputs[0].dtype != part.dtype or id(node.outputs[0]) in view.outputs:
        return None
    other = next((tensor for tensor in node.inputs if tensor is not last), last)
    number = number_of(other)
    if number is None or len(dims(other)) > len(dims(last)):
        return None
    return Shift(node, chain, number)


def _views(tensor: gs.Tensor, view: View) -> Iterator[gs.Tensor]:
    """The same values with other axes, as long as one node reads them."""
    while (node := sole_reader(tensor, view)) is not None and node.inputs[0] is tensor:
        cut = cut_of(node)
        if not is_op(node, "Unsqueeze") and (cut is None or not cut.takes_all):
            return
        tensor = node.outputs[0]
        yield tensor


def _take_over(shift: Shift, edit: Edit) -> None:
    """Let the last view be what the sum was; the others hold other values now, and get other names."""
    *views, last = shift.views
    for view in views:
        view.name = edit.names.fresh(f"{view.name}/shifted")
    (total,) = edit.release(shift.total)
    node = last.inputs[0]
    node.outputs[next(i for i, tensor in enumerate(node.outputs) if tensor is last)] = total


def _cut_images(split: gs.Node, edit: Edit) -> None:
    """One Split for all images, where the parts of `split` are cut image by image."""
    columns, count = split.inputs[0], len(split.outputs)
    batch = columns.shape[0]
    if not isinstance(batch, (int, np.integer)) or batch < 2 or batch * count > _BY_VALUE:
        return
    cuts = [
        (j, node) for j, part in enumerate(split.outputs) for node in _image_cuts(part, int(batch), edit.view)
    ]
    if len(cuts) < 2:
        return
    # (batch, count * channels) -> rows (1, channels), those of an image one after another
    new = edit.at(split)
    parts = new.rows(columns, int(batch) * count, int(columns.shape[1]) // count)
    axis = new.ints("axis", 1)
    for j, node in cuts:
        for i, image in enumerate(edit.release(node)):
            new.emit_to("Unsqueeze", [parts[i * count + j], axis], [image])


def _image_cuts(part: gs.Tensor, batch: int, view: View) -> Iterator[gs.Node]:
    """The nodes that cut a part, as (batch, 1, channels), image by image."""
    last = [part, *_views(part, view)][-1]
    if len(dims(last)) != 3 or last.shape[1] != 1:
        return
    for node in last.outputs:
        along = is_op(node, "Split") and node.attrs.get("axis", 0) == 0 and len(node.inputs) == 1
        if along and len(node.outputs) == batch:
            yield node
