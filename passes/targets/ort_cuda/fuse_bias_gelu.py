"""fuse-bias-gelu: a bias and the Gelu behind it become one kernel of ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.edit import Names, rename_after, replace_chains
from passes.graph.match import STANDARD, is_bias, output_ids, producer
from passes.targets.ort_cuda.flatten_attention import MICROSOFT


@register
@dataclass(frozen=True)
class FuseBiasGelu(Pass):
    """Write Gelu(x + bias) as BiasGelu(x, bias), or FastGelu(x, bias) where Gelu is approximated by tanh.

    Fires where the bias is a constant along the last axis and nothing else reads the sum. Both are operators of
    domain com.microsoft: for ONNX Runtime alone.
    """

    name: ClassVar[str] = "fuse-bias-gelu"

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace the Gelu; the sum goes."""
        names, kept = Names(graph), output_ids(graph)

        def rewrite(node: gs.Node) -> tuple[gs.Node, list[gs.Node]] | None:
            total = _sum(node, kept)
            if total is None:
                return None
            x, bias = total.inputs if is_bias(total.inputs[1], total.inputs[0]) else total.inputs[::-1]
            op = "FastGelu" if node.attrs.get("approximate", "none") == "tanh" else "BiasGelu"
            rename_after(producer(x), total, node, names, kept)
            name = names.fresh(f"{node.name}/{op}")
            return gs.Node(op, name, inputs=[x, bias], domain=MICROSOFT), [total]

        changed = replace_chains(graph, rewrite)
        return PassResult(changed, (f"{changed} pairs",) if changed else ())


def _sum(node: gs.Node, kept: set[int]) -> gs.Node | None:
    """The sum with a bias that a Gelu alone reads."""
    if node.op != "Gelu" or node.domain not in STANDARD:
        return None
    value = node.inputs[0]
    total = producer(value)
    if total is None or total.op != "Add" or len(value.outputs) != 1 or id(value) in kept:
        return None
    left, right = total.inputs
    return total if is_bias(right, left) or is_bias(left, right) else None
