"""fold-gates: the gate of an output projection is multiplied into its weights, which are fewer values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import Projection, View, dims, either, is_op, projection, sole_producer


@dataclass(frozen=True)
class Gate:
    """gate * (x W + b): the product with the gate, (batch, 1, N), and the projection."""

    node: gs.Node
    gate: gs.Tensor
    inner: Projection


@register
@dataclass(frozen=True)
class FoldGates(Pass):
    """Multiply a gate into the weights of the projection before it, where that is fewer values to multiply.

        before: Mul(gate, Add(MatMul(x, W), b))        after: Add(MatMul(x, Mul(W, gate)), Mul(gate, b))

    x is (batch, tokens, K), W [K, N], the gate (batch, 1, N) and computed; the bias may be missing. Each image then has
    weights of its own, which batched products take as they are. The product over all tokens was a kernel that reads
    and writes every one.

    Declines when: `tokens` is unknown or not more than K; x is of the `short` axis; the gate has another shape or type.

    Changes numbers: in 16-bit types each gated weight is rounded, and the product no more. In float32, none but the
    order of two multiplications.
    """

    name: ClassVar[str] = "fold-gates"
    tolerance: ClassVar[float] = 1e-3
    tokens: int = 0
    """Tokens of an image at the sizes that the model is made fast for; 0: unknown, nothing changes."""
    short: str = "text"
    """What the graph calls an axis of few tokens."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the products of gates and projections."""
        return Edit(graph).rewrite_each(self.match, self.rewrite, "gates")

    def match(self, node: gs.Node, view: View) -> Gate | str | None:
        """The node as the product of a gate and a projection that nothing else reads."""
        reason = None
        for gate, value in either(node) if is_op(node, "Mul") else ():
            inner = projection(sole_producer(value, view), view)
            if inner is None or isinstance(gate, gs.Constant):
                continue
            found = Gate(node, gate, inner)
            reason = self._reason(found)
            if reason is None:
                return found
        return reason

    def _reason(self, found: Gate) -> str | None:
        gate, x, weight = found.gate, found.inner.x, found.inner.weight
        if dims(gate) != [x.shape[0], 1, weight.shape[1]] or gate.dtype != weight.dtype:
            return "the gate is not (batch, 1, channels) in the type of the weights"
        if self.short in x.shape:
            return f"the projection is over the short axis {self.short!r}"
        if weight.shape[0] >= self.tokens:
            return (
                f"the weights have {weight.shape[0]} rows, and an image has {self.tokens or 'unknown'} tokens"
            )
        return None

    def rewrite(self, found: Gate, edit: Edit) -> None:
        """Gate the weights and the bias in place of the result."""
        gate, inner, new = found.gate, found.inner, edit.at(found.node)
        outputs = edit.release(found.node)
        edit.remove(*inner.nodes)
        # W [K, N] times the gate (batch, 1, N): weights (batch, K, N), an image's own
        weight_shape = [inner.x.shape[0], *inner.weight.shape]
        weight = new.emit("Mul", [inner.weight, gate], gate.dtype, weight_shape)
        if inner.bias is None:
            new.emit_to("MatMul", [inner.x, weight], outputs)
            return
        value = new.emit("MatMul", [inner.x, weight], gate.dtype, outputs[0].shape)
        # b [N] times the gate: (batch, 1, N), for all tokens of an image
        bias = new.emit("Mul", [gate, inner.bias], gate.dtype, gate.shape)
        new.emit_to("Add", [value, bias], outputs)
