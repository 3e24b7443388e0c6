"""merge-row-products: parts of one small tensor that are multiplied by constants, each by its own, in one kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit, joined_rows
from passes.graph.match import View, dims, is_op, is_weight
from passes.weights.recipe import constant

_VIEWS = ("Reshape", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class RowProduct:
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

        before: Mul(row, vector) for rows of Split(x)
        after:  Reshape(row) for rows of Split(Mul(Reshape(x), [vector vector ...]))

    On a Split of x [rows, channels] into single rows, two or more of which, or views of which, are multiplied by a
    constant [channels], as gates are by the biases of projections. Rows that nothing multiplies are multiplied as well:
    these are few values, and what costs is the number of kernels.

    Declines when: one row alone is multiplied; the constant has another shape or type than a row.
    """

    name: ClassVar[str] = "merge-row-products"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the products of each Split."""
        return Edit(graph).rewrite_groups(self.match, list, self.rewrite, "products")

    def match(self, node: gs.Node, _view: View) -> list[RowProduct] | str | None:
        """The products of the rows of a Split, the first of each row."""
        if not is_op(node, "Split") or node.attrs.get("axis", 0) != 0 or len(node.inputs) != 1:
            return None
        shape = dims(node.inputs[0])
        if len(shape) != 2 or shape[0] != len(node.outputs):
            return None
        products = [next(_products(node, row), None) for row in range(len(node.outputs))]
        found = [item for item in products if item is not None]
        return (
            found
            if len(found) > 1
            else "fewer than two rows are multiplied by a constant [channels] of their type"
        )

    def rewrite(self, group: Sequence[RowProduct], edit: Edit) -> None:
        """One product, and a Split of its own."""
        split, first = group[0].split, group[0].node
        rows, channels = (int(size) for size in split.inputs[0].shape)
        vectors = dict.fromkeys(range(rows), group[0].vector) | {item.row: item.vector for item in group}
        new = edit.at(split, named=first)
        # [rows, channels] -> [rows * channels], times the vectors one after another -> rows (1, channels)
        joined = constant(new.names.fresh(f"{first.name}/rows"), joined_rows(vectors.values()))
        flat = new.reshape(split.inputs[0], [-1])
        value = new.emit("Mul", [flat, joined], first.outputs[0].dtype, [rows * channels])
        parts = new.rows(value, rows, channels)
        for item in group:
            outputs = edit.release(item.node)
            new.emit_to("Reshape", [parts[item.row], new.ints("shape", *item.shape)], outputs)


def _products(split: gs.Node, row: int) -> Iterator[RowProduct]:
    """The products of a row, or of a view of it, and a constant vector of as many values."""
    part = split.outputs[row]
    for tensor in _views(part):
        for node in tensor.outputs if dims(tensor) else ():
            for vector in node.inputs if is_op(node, "Mul") else ():
                if is_weight(vector) and vector.dtype == part.dtype and dims(vector) == [part.shape[1]]:
                    yield RowProduct(split, row, node, vector, dims(tensor))


def _views(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The tensor and its views, the values in the same order."""
    yield tensor
    for node in tensor.outputs:
        if node.op in _VIEWS and node.inputs[0] is tensor:
            yield from _views(node.outputs[0])
