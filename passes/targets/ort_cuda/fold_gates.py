"""fold-gates: the gate behind an output projection is multiplied into its weights, which are fewer values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Emitter, Names, replace_found
from passes.graph.match import output_ids, sole_producer, weight_recipe


class Gate(NamedTuple):
    """gate * (x W + b): the nodes that go, gate (batch, 1, N), x (batch, tokens, K), W [K, N], b [N] or None."""

    nodes: tuple[gs.Node, ...]
    gate: gs.Tensor
    x: gs.Tensor
    weight: gs.Tensor
    bias: gs.Tensor | None


@register
@dataclass(frozen=True)
class FoldGates(Pass):
    """Write gate * (x W + b) as x (W gate) + b gate, where that is fewer values to multiply.

    Fires where gate is computed, (batch, 1, N), W a constant [K, N] in the model's type, and an image has more
    `tokens` than K; x is (batch, tokens, K) and not of the `short` axis. Each image then has weights of its own, which
    batched products take as they are. The product over all tokens was a kernel that reads and writes every one.

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
        """Replace the products behind projections."""
        names, kept = Names(graph), output_ids(graph)

        def find(node: gs.Node) -> Gate | None:
            found = _gate(node, kept)
            return found if found is not None and self._pays(found) else None

        def fold(found: Gate, new: dict[int, list[gs.Node]], dead: set[int]) -> None:
            new[id(found.nodes[0])] = _folded(found, Emitter(found.nodes[0], names))
            dead |= {id(node) for node in found.nodes}

        changed = replace_found(graph, find, fold)
        return PassResult(changed, (f"{changed} gates",) if changed else ())

    def _pays(self, found: Gate) -> bool:
        return found.weight.shape[0] < self.tokens and self.short not in found.x.shape


def _gate(node: gs.Node, kept: set[int]) -> Gate | None:
    """The node as the product of a gate and a projection that nothing else reads."""
    if node.op != "Mul":
        return None
    for gate, value in (node.inputs, node.inputs[::-1]):
        total = sole_producer(value, kept)
        if total is None or isinstance(gate, gs.Constant):
            continue
        product, bias = _projection(total, kept)
        if product is None:
            continue
        x, weight = product.inputs
        nodes = (node, product) if bias is None else (node, total, product)
        if list(gate.shape or ()) == [x.shape[0], 1, weight.shape[1]] and gate.dtype == weight.dtype:
            return Gate(nodes, gate, x, weight, bias)
    return None


def _projection(node: gs.Node, kept: set[int]) -> tuple[gs.Node | None, gs.Tensor | None]:
    """The MatMul with constant weights of a node that is it, or is its sum with a bias, and that bias."""
    if node.op == "MatMul":
        return (node, None) if _is_projection(node) else (None, None)
    for value, bias in (node.inputs, node.inputs[::-1]) if node.op == "Add" else ():
        product = sole_producer(value, kept)
        if product is not None and isinstance(bias, gs.Constant) and _is_projection(product):
            fits = list(bias.shape) == [product.inputs[1].shape[1]]
            return (product, bias) if fits else (None, None)
    return None, None


def _is_projection(node: gs.Node) -> bool:
    if node.op != "MatMul" or len(node.inputs[0].shape or ()) != 3 or weight_recipe(node.inputs[1]) is None:
        return False
    return len(node.inputs[1].shape) == 2


def _folded(found: Gate, new: Emitter) -> list[gs.Node]:
    """The nodes that give what the product gave."""
    x, gate, (output,) = found.x, found.gate, found.nodes[0].outputs
    found.nodes[0].outputs.clear()
    weight = new.emit("Mul", [found.weight, gate], gate.dtype)
    weight.shape = [x.shape[0], *found.weight.shape]
    if found.bias is None:
        new.emit_to("MatMul", [x, weight], [output])
        return new.nodes
    value = new.emit("MatMul", [x, weight], gate.dtype)
    value.shape = list(output.shape)
    bias = new.emit("Mul", [gate, found.bias], gate.dtype)
    bias.shape = list(gate.shape)
    new.emit_to("Add", [value, bias], [output])
    return new.nodes
