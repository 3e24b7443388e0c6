"""merge-row-products: parts of one small tensor that are multiplied by constants, each by its own, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, joined_rows, replace_groups
from passes.graph.match import weight_recipe
from passes.weights.recipe import constant

_VIEWS = ("Reshape", "Unsqueeze", "Squeeze")


class Product(NamedTuple):
    """The product of row number `row` of a Split, seen as `shape`, and a constant vector."""

    split: gs.Node
    row: int
    node: gs.Node
    vector: gs.Constant
    shape: list[int]


@register
@dataclass(frozen=True)
class MergeRowProducts(Pass):
    """Multiply all rows of a tensor at once, where they are split and each multiplied by its own constant. Exact.

    Fires on a Split of [rows, channels] into single rows, two or more of which are multiplied by a constant vector
    [channels], as gates are by the biases behind projections. Rows that nothing multiplies are multiplied as well:
    these are few values, and what costs is the number of kernels.
    """

    name: ClassVar[str] = "merge-row-products"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the products of each Split."""
        names = Names(graph)
        merged = replace_groups(graph, _groups, lambda group, new, dead: _merge(group, names, new, dead))
        return PassResult(merged, (f"{merged} products",) if merged else ())


def _groups(graph: gs.Graph) -> Iterator[list[Product]]:
    """The products behind each Split into rows."""
    for node in graph.nodes:
        if node.op != "Split" or node.attrs.get("axis", 0) != 0 or len(node.inputs) != 1:
            continue
        shape = list(node.inputs[0].shape or ())
        if len(shape) != 2 or shape[0] != len(node.outputs):
            continue
        found = [_product(node, row) for row in range(len(node.outputs))]
        products = [item for item in found if item is not None]
        if len(products) > 1:
            yield products


def _product(split: gs.Node, row: int) -> Product | None:
    """The first product of a row, or of a view of it, and a constant vector of as many values."""
    part = split.outputs[row]
    for tensor in _seen_as(part):
        for node in tensor.outputs if tensor.shape is not None else ():
            for vector in node.inputs if node.op == "Mul" else ():
                plain = isinstance(vector, gs.Constant) and vector.dtype == part.dtype
                if plain and list(vector.shape) == [part.shape[1]] and weight_recipe(vector) is not None:
                    return Product(split, row, node, vector, list(tensor.shape))
    return None


def _seen_as(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The tensor and its views, the values in the same order."""
    yield tensor
    for node in tensor.outputs:
        if node.op in _VIEWS and node.inputs[0] is tensor:
            yield from _seen_as(node.outputs[0])


def _merge(group: Sequence[Product], names: Names, new: dict[int, list[gs.Node]], dead: set[int]) -> None:
    """One product in front of a Split of its own."""
    split, first = group[0].split, group[0].node
    rows, channels = (int(size) for size in split.inputs[0].shape)
    vectors = dict.fromkeys(range(rows), group[0].vector) | {item.row: item.vector for item in group}
    at = Emitter(first, names)
    joined = constant(names.fresh(f"{first.name}/rows"), joined_rows(vectors.values()))
    value = at.emit("Mul", [at.reshape(split.inputs[0], [-1]), joined], first.outputs[0].dtype)
    value.shape = [rows * channels]
    parts = at.rows(value, rows, channels)
    for item in group:
        output = item.node.outputs[0]
        item.node.outputs.clear()
        dead.add(id(item.node))
        at.emit_to(
            "Reshape", [parts[item.row], at.constant("shape", np.array(item.shape, np.int64))], [output]
        )
    new[id(split)] = at.nodes
