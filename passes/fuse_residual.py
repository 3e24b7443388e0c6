"""fuse-residual: a matrix product is added to the values that it changes in one Gemm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graphs import Emitter, Names, alone, output_ids, replace_groups


class Residual(NamedTuple):
    """x W + rest: the sum, the product, and the rest."""

    sum: gs.Node
    product: gs.Node
    rest: gs.Tensor


@register
@dataclass(frozen=True)
class FuseResidual(Pass):
    """Write rest + MatMul(x, W) of one image as Gemm(x, W, rest), tokens as rows.

    Fires where x is (1, tokens, K), W [K, N], and `rest` a computed (1, tokens, N), which fuse-skip-norm leaves where
    more than two terms make a sum. ONNX Runtime's Gemm copies `rest` to the output and adds the product there: 34.8
    us on an H200 for 28 and 10 over 4,096 tokens of 1,536 channels.

    Exact but for rounding: what two kernels did is rounded once.
    """

    name: ClassVar[str] = "fuse-residual"
    tolerance: ClassVar[float] = 1e-3

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace sums and the products in them."""
        names, kept = Names(graph), output_ids(graph)
        changed = replace_groups(
            graph,
            lambda part: ([found] for node in part.nodes for found in _residuals(node, kept)),
            lambda group, new, dead: _replace(group, names, new, dead),
        )
        return PassResult(changed, (f"{changed} sums",) if changed else ())


def _residuals(node: gs.Node, kept: set[int]) -> Iterator[Residual]:
    """The node as the sum of a product and another tensor of its shape."""
    for value, rest in (node.inputs, node.inputs[::-1]) if node.op == "Add" else ():
        product = alone(value, kept)
        if product is not None and product.op == "MatMul" and _fits(product, rest):
            yield Residual(node, product, rest)
            return


def _fits(product: gs.Node, rest: gs.Tensor) -> bool:
    x, weight = product.inputs
    if isinstance(rest, gs.Constant) or len(weight.shape or ()) != 2 or rest.dtype != x.dtype:
        return False
    shapes = list(x.shape or ()), list(rest.shape or ())
    if any(len(shape) != 3 or shape[0] != 1 or shape[1] == 1 for shape in shapes):
        return False
    return bool(shapes[1][2] == weight.shape[1])


def _replace(group: Sequence[Residual], names: Names, new: dict[int, list[gs.Node]], dead: set[int]) -> None:
    found = group[0]
    at = Emitter(found.sum, names)
    x, weight = found.product.inputs
    dtype = found.sum.outputs[0].dtype
    rows = [
        at.emit(
            "Reshape", [tensor, at.constant("rows", np.array([-1, int(tensor.shape[2])], np.int64))], dtype
        )
        for tensor in (x, found.rest)
    ]
    total = at.emit("Gemm", [rows[0], weight, rows[1]], dtype)
    output = found.sum.outputs[0]
    found.sum.outputs.clear()
    shape = at.constant("shape", np.array([1, -1, int(weight.shape[1])], np.int64))
    at.emit_to("Reshape", [total, shape], [output])
    new[id(found.sum)] = at.nodes
    dead |= {id(found.sum), id(found.product)}
