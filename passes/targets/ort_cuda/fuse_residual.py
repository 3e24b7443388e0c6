"""fuse-residual: a matrix product is added to the values that it changes in one Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import View, either, is_op, is_token_product, producer
from passes.targets.ort_cuda.residuals import is_full


@dataclass(frozen=True)
class Residual:
    """rest + x W: the sum, the product, and the rest."""

    total: gs.Node
    product: gs.Node
    rest: gs.Tensor


@register
@dataclass(frozen=True)
class FuseResidual(Pass):
    """Add the product of one image to its residual stream in a Gemm, whose rows are the tokens.

        before: Add(rest, MatMul(x, W))        after: Reshape(Gemm(Reshape(x), W, Reshape(rest)))

    x is (1, tokens, K), W [K, N], and `rest` (1, tokens, N) is computed; fuse-skip-norm leaves such sums where they
    have more than two terms. ONNX Runtime's Gemm copies `rest` to the output and adds the product there: 34.8 us on an
    H200 for 28 and 10 over 4,096 tokens of 1,536 channels.

    Declines when: the batch is not 1; `rest` has one row for all tokens; something else reads the product.

    Exact but for rounding: what two kernels did is rounded once.
    """

    name: ClassVar[str] = "fuse-residual"
    tolerance: ClassVar[float] = 1e-3

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace sums and the products in them."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "sums")

    def match(self, node: gs.Node, view: View) -> Residual | str | None:
        """The node as the sum of a product and another tensor of its shape."""
        reason = None
        for value, rest in either(node) if is_op(node, "Add") else ():
            product = producer(value)
            if not is_token_product(product) or isinstance(rest, gs.Constant):
                continue
            reason = _reason(product, rest, view)
            if reason is None:
                return Residual(node, product, rest)
        return reason

    def rewrite(self, found: Residual, edit: Edit) -> None:
        """Rows in, Gemm, and the axes as they were."""
        new = edit.at(found.total)
        (x, weight), (output,) = found.product.inputs, edit.release(found.total)
        edit.remove(found.product)
        x_rows, rest_rows = (new.reshape(tensor, [-1, int(tensor.shape[2])]) for tensor in (x, found.rest))
        total = new.emit("Gemm", [x_rows, weight, rest_rows], output.dtype)
        new.emit_to("Reshape", [total, new.ints("shape", 1, -1, int(weight.shape[1]))], [output])


def _reason(product: gs.Node, rest: gs.Tensor, view: View) -> str | None:
    x, value = product.inputs[0], product.outputs[0]
    if not view.is_sole(value):
        return "something else reads the product"
    if x.shape[0] != 1 or value.shape[0] != 1:
        return "the batch is not 1"
    if x.shape[1] == 1 or not is_full(rest, value):
        return "what is added to the product is not (1, tokens, channels)"
    return None
