"""merge-modulations: the modulations of all blocks come from one product, and each step behind it is one kernel."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, joined_rows, replace_groups
from passes.graph.match import array_of, output_ids, producer, weight_recipe
from passes.weights.recipe import Recipe, constant, dtype_of, recipe_of

_BY_VALUE = 32  # outputs whose addresses ONNX Runtime's CUDA Split hands to its kernel without a copy
_SAME = ("Sigmoid", "Mul", "Swish", "Cast")  # what a block computes of the embedding before its product


class Modulation(NamedTuple):
    """A product of the embedding, (batch, parts * channels), and the Split that takes it apart."""

    product: gs.Node
    split: gs.Node

    @property
    def width(self) -> int:
        """Columns of the product."""
        return int(self.product.inputs[1].shape[0])


class Shift(NamedTuple):
    """A number that is added to one part of a modulation, as in 1 + scale."""

    sum: gs.Node
    views: list[gs.Tensor]
    value: float


@register
@dataclass(frozen=True)
class MergeModulations(Pass):
    """Join the products that give scales, shifts and gates of every block: same input, weights W [N, K] one by one.

    Fires on Gemm(x, W, b) of constant W and b whose output (batch, N) is cut into equal parts and whose x is the same
    for two or more of them (each block of a diffusion transformer computes SiLU of the embedding anew). Weights of the
    same shape are joined along N, up to `most` values, and one Split gives each block its columns of the result. A
    number added to a part (1 + scale) is added to the joined result, with zero for the other parts. Where the batch
    is a number and parts are cut image by image, one Split makes the parts of all images.

    All of it is done on a few values, by many small kernels: this saves most of them. Exact but for the order of
    the sums in the product.
    """

    name: ClassVar[str] = "merge-modulations"
    most: int = 1 << 30

    def run(self, graph: gs.Graph) -> PassResult:
        """Join the products of each graph."""
        names, kept = Names(graph), output_ids(graph)
        merged = replace_groups(
            graph,
            lambda part: self._groups(part, kept),
            lambda group, new, dead: _merge(group, names, kept, new, dead),
        )
        return PassResult(merged, (f"{merged} products",) if merged else ())

    def _groups(self, graph: gs.Graph, kept: set[int]) -> Iterator[list[Modulation]]:
        """Modulations of one input, in the order of the graph, as many at once as `most` allows."""
        found: dict[Hashable, list[Modulation]] = defaultdict(list)
        for node in graph.nodes:
            split = _split_of(node, kept)
            if split is not None:
                x, weight = node.inputs[:2]
                found[_key(x), str(weight.dtype), *weight.shape].append(Modulation(node, split))
        for group in found.values():
            most = max(1, min(_BY_VALUE, self.most // math.prod(group[0].product.inputs[1].shape)))
            size = math.ceil(len(group) / math.ceil(len(group) / most))
            pieces = (group[start : start + size] for start in range(0, len(group), size))
            yield from (piece for piece in pieces if len(piece) > 1)


def _split_of(node: gs.Node, kept: set[int]) -> gs.Node | None:
    """The Split into equal parts that alone reads the node, a Gemm with constant weights [N, K] and bias."""
    if node.op != "Gemm" or len(node.inputs) != 3 or not node.attrs.get("transB", 0):
        return None
    plain = (
        not node.attrs.get("transA", 0) and node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0
    )
    _, weight, bias = node.inputs
    output = node.outputs[0]
    if not plain or recipe_of(weight) is None or weight_recipe(bias) is None or len(bias.shape) != 1:
        return None
    if len(output.outputs) != 1 or id(output) in kept or len(output.shape or ()) != 2:
        return None
    split = output.outputs[0]
    if split.op != "Split" or split.attrs.get("axis", 0) not in (1, -1):
        return None
    sizes = array_of(split.inputs[1]) if len(split.inputs) > 1 else None
    equal = len(split.inputs) == 1 or (sizes is not None and len(set(sizes.tolist())) == 1)
    return split if equal and weight.shape[0] % len(split.outputs) == 0 else None


def _key(tensor: gs.Tensor) -> Hashable:
    """Equal for tensors that are computed in the same way from the same one."""
    node = producer(tensor)
    if node is None or node.op not in _SAME:
        return id(tensor)
    return (node.op, node.domain, str(sorted(node.attrs.items())), *map(_key, node.inputs))


def _merge(
    group: Sequence[Modulation], names: Names, kept: set[int], new: dict[int, list[gs.Node]], dead: set[int]
) -> None:
    """One product for the group, at the place of its first.

    New nodes are called after the modules that take modulations apart: what the products' own modules give is no more.
    """
    first = group[0].product
    at = Emitter(group[0].split, names)
    weights = [_joined(group, index, names) for index in (1, 2)]
    result = at.emit("Gemm", [first.inputs[0], *weights], first.outputs[0].dtype, transB=1)
    result.shape = [first.outputs[0].shape[0], sum(item.width for item in group)]
    result = _shifted(result, group, at, kept, dead)
    columns = [_columns(at, result, item) for item in group]
    at.emit_to("Split", [result], columns, axis=1, num_outputs=len(columns))
    new[id(first)] = at.nodes
    for item, mine in zip(group, columns, strict=True):
        item.split.inputs[0] = mine
        dead.add(id(item.product))
        new[id(item.split)] = _by_image(item.split, Emitter(item.split, names), dead)


def _columns(at: Emitter, result: gs.Tensor, item: Modulation) -> gs.Tensor:
    name = at.names.fresh(f"{item.split.name}/columns")
    return gs.Variable(name, dtype=result.dtype, shape=[result.shape[0], item.width])


def _joined(group: Sequence[Modulation], index: int, names: Names) -> gs.Constant:
    """The weights of a group, rows behind rows."""
    tensors = [item.product.inputs[index] for item in group]
    return constant(names.fresh(f"{tensors[0].name}/joined"), joined_rows(tensors))


def _shifted(
    result: gs.Tensor, group: Sequence[Modulation], at: Emitter, kept: set[int], dead: set[int]
) -> gs.Tensor:
    """The joined result with the numbers added that are added to its parts, which are not any more."""
    vector = np.zeros(sum(item.width for item in group), np.float32)
    start = 0
    for item in group:
        size = item.width // len(item.split.outputs)
        for output in item.split.outputs:
            shift = _shift_of(output, kept)
            if shift is not None:
                vector[start : start + size] = shift.value
                dead.add(id(shift.sum))
                _take_over(shift, at.names)
            start += size
    if not vector.any():
        return result
    recipe, dtype = Recipe.of_array(vector), dtype_of(result)
    name = at.names.fresh(f"{at.site.name}/numbers")
    total = at.emit("Add", [result, constant(name, recipe.cast(dtype or recipe.dtype))], result.dtype)
    total.shape = list(result.shape)
    return total


def _shift_of(part: gs.Tensor, kept: set[int]) -> Shift | None:
    """The sum of a part and a number, when nothing else reads the part or a view of it."""
    chain = [part, *_views(part, kept)]
    last = chain[-1]
    if len(last.outputs) != 1 or id(last) in kept:
        return None
    node = last.outputs[0]
    if node.op != "Add" or node.outputs[0].dtype != part.dtype or id(node.outputs[0]) in kept:
        return None
    other = next((tensor for tensor in node.inputs if tensor is not last), last)
    number = array_of(other)
    if number is None or number.size != 1 or number.ndim > len(last.shape or ()):
        return None
    return Shift(node, chain, float(number.item()))


def _views(tensor: gs.Tensor, kept: set[int]) -> Iterator[gs.Tensor]:
    """The same values with other axes, as long as one node reads them."""
    while len(tensor.outputs) == 1 and id(tensor) not in kept:
        node = tensor.outputs[0]
        if node.inputs[0] is not tensor or not (node.op == "Unsqueeze" or _takes_all(node)):
            return
        tensor = node.outputs[0]
        yield tensor


def _takes_all(node: gs.Node) -> bool:
    """Whether the node is a Slice from the start to the end."""
    if node.op != "Slice":
        return False
    starts, ends, *_ = bounds = [array_of(tensor) for tensor in node.inputs[1:]]
    steps = bounds[3] if len(bounds) > 3 else np.ones(1)
    if starts is None or ends is None or steps is None:
        return False
    return bool(np.all(starts == 0) and np.all(ends >= np.iinfo(np.int32).max) and np.all(steps == 1))


def _take_over(shift: Shift, names: Names) -> None:
    """Let the last view be what the sum was; the others hold other values now, and get other names."""
    *views, last = shift.views
    for view in views:
        view.name = names.fresh(f"{view.name}/shifted")
    total = shift.sum.outputs[0]
    shift.sum.outputs.clear()
    node = last.inputs[0]
    node.outputs[next(i for i, tensor in enumerate(node.outputs) if tensor is last)] = total


def _by_image(split: gs.Node, new: Emitter, dead: set[int]) -> list[gs.Node]:
    """One Split for all images, where the parts of `split` are cut image by image."""
    columns, count = split.inputs[0], len(split.outputs)
    batch = columns.shape[0]
    if not isinstance(batch, (int, np.integer)) or batch < 2 or batch * count > _BY_VALUE:
        return []
    cuts = [(j, node) for j, part in enumerate(split.outputs) for node in _image_cuts(part, int(batch))]
    if len(cuts) < 2:
        return []
    parts = new.rows(columns, int(batch) * count, int(columns.shape[1]) // count)
    axis = new.constant("axis", np.array([1], np.int64))
    for j, node in cuts:
        images = list(node.outputs)
        node.outputs.clear()
        dead.add(id(node))
        for i, image in enumerate(images):
            new.emit_to("Unsqueeze", [parts[i * count + j], axis], [image])
    return new.nodes


def _image_cuts(part: gs.Tensor, batch: int) -> Iterator[gs.Node]:
    """The nodes that cut a part, as (batch, 1, channels), image by image."""
    last = [part, *_views(part, set())][-1]
    if len(last.shape or ()) != 3 or last.shape[1] != 1:
        return
    for node in last.outputs:
        along = node.op == "Split" and node.attrs.get("axis", 0) == 0 and len(node.inputs) == 1
        if along and len(node.outputs) == batch:
            yield node
