"""fuse-rms-norm: a root-mean-square norm spelled out in ten operators becomes one RMSNormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Names, replace_chains
from passes.graph.match import array_of, output_ids, producer, uncast


@register
@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """Write x * rsqrt(mean(x^2) + eps) * weight, over the last axis, as RMSNormalization (opset 23).

    Fires on Pow (by 2) - ReduceMean - Add (eps) - Sqrt - Reciprocal - Mul (with x) - Mul (with the weight), with the
    Casts to float32 and back that torch's exporter puts around it: RMSNormalization computes in float32 as well and
    rounds at the same place, before the weight.

    Not below opset 23, over other axes, without a weight along the last axis alone, or where something else
    reads an intermediate value behind the mean.
    """

    name: ClassVar[str] = "fuse-rms-norm"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the last node of each chain; what it alone needed goes with it."""
        if graph.opset < 23:
            return PassResult()
        names, kept = Names(graph), output_ids(graph)

        def rewrite(node: gs.Node) -> tuple[gs.Node, tuple[gs.Node, ...]] | None:
            chain = _match(node, kept)
            return None if chain is None else (_norm(chain, node, names), chain.others)

        changed = replace_chains(graph, rewrite)
        return PassResult(changed, (f"{changed} norms",) if changed else ())


@dataclass(frozen=True)
class _Chain:
    """A norm: `others` go from the reciprocal's product up to the product with the weight, without it."""

    x: gs.Tensor
    weight: gs.Tensor
    epsilon: float
    others: tuple[gs.Node, ...]


def _match(node: gs.Node, kept: set[int]) -> _Chain | None:
    """The chain that `node`, a product with a weight, ends."""
    if node.op != "Mul":
        return None
    for scaled, weight in (node.inputs, node.inputs[::-1]):
        if not isinstance(weight, gs.Constant) or len(weight.shape or ()) != 1:
            continue
        cast = producer(scaled)
        product = producer(cast.inputs[0]) if cast is not None and cast.op == "Cast" else cast
        if product is None or product.op != "Mul":
            continue
        between = (product,) if product is cast else (product, cast)
        if any(len(n.outputs[0].outputs) != 1 or id(n.outputs[0]) in kept for n in between if n is not None):
            continue
        found = _normalized(product)
        if found is not None and _fits(found[0], weight, node):
            return _Chain(found[0], weight, found[1], tuple(n for n in between if n is not None))
    return None


def _normalized(product: gs.Node) -> tuple[gs.Tensor, float] | None:
    """x and epsilon when `product` is x * rsqrt(mean(x^2) + eps)."""
    for left, right in (product.inputs, product.inputs[::-1]):
        root = _through(right, "Reciprocal", "Sqrt")
        total = _of(root, "Add")
        if total is None or len(total.inputs) != 2:
            continue
        for mean, epsilon in (total.inputs, total.inputs[::-1]):
            value, reduce = array_of(epsilon), producer(mean)
            if value is None or value.size != 1 or reduce is None or not _over_last(reduce):
                continue
            power = _of(reduce.inputs[0], "Pow")
            exponent = None if power is None else array_of(power.inputs[1])
            if power is None or exponent is None or exponent.size != 1 or float(exponent.item()) != 2.0:
                continue
            if uncast(power.inputs[0]) is uncast(left):
                return uncast(left), float(value.item())
    return None


def _of(tensor: gs.Tensor | None, op: str) -> gs.Node | None:
    node = None if tensor is None else producer(tensor)
    return node if node is not None and node.op == op else None


def _through(tensor: gs.Tensor, *ops: str) -> gs.Tensor | None:
    """The input of a chain of single-input operators that ends in `tensor`."""
    current: gs.Tensor | None = tensor
    for op in ops:
        node = _of(current, op)
        current = None if node is None else node.inputs[0]
    return current


def _over_last(node: gs.Node) -> bool:
    """Whether the node is a ReduceMean over the last axis that keeps it."""
    if node.op != "ReduceMean" or len(node.inputs) != 2 or not node.attrs.get("keepdims", 1):
        return False
    axes = array_of(node.inputs[1])
    rank = len(node.inputs[0].shape or ())
    return axes is not None and axes.size == 1 and int(axes.item()) in (-1, rank - 1 if rank else -1)


def _fits(x: gs.Tensor, weight: gs.Tensor, node: gs.Node) -> bool:
    """The weight lies along the last axis, and x, weight and result have one type."""
    if not x.shape or weight.shape is None or x.shape[-1] != weight.shape[0]:
        return False
    return x.dtype is not None and x.dtype == weight.dtype == node.outputs[0].dtype


def _norm(chain: _Chain, last: gs.Node, names: Names) -> gs.Node:
    attrs = {"axis": -1, "epsilon": chain.epsilon, "stash_type": 1}
    name = names.fresh(f"{last.name}/RMSNormalization")
    return gs.Node("RMSNormalization", name, attrs=attrs, inputs=[chain.x, chain.weight])
