"""cancel-negation: two negations in a row are none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, Refusal, register, walk


@register
@dataclass(frozen=True)
class CancelNegation(Pass):
    """Read a tensor in the place of its double negation.

    before: y = Neg(Neg(x))      after: y = x, read by whoever read y
    declines when: y is an output of the graph, whose name must stay.
    remove-unused then drops the nodes that nothing reads.
    """

    name: ClassVar[str] = "cancel-negation"

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite `graph` in place."""
        changed, refusals = 0, []
        for part in walk(graph):
            outputs = {id(tensor) for tensor in part.outputs}
            for node in part.nodes:
                inner = node.inputs[0].inputs[0] if node.op == "Neg" and node.inputs[0].inputs else None
                if inner is None or inner.op != "Neg":
                    continue
                if id(node.outputs[0]) in outputs:
                    refusals.append(Refusal(node.name, "its output is an output of the graph"))
                    continue
                for reader in list(node.outputs[0].outputs):
                    reader.inputs = [inner.inputs[0] if t is node.outputs[0] else t for t in reader.inputs]
                    changed += 1
        return PassResult(changed, refusals=tuple(refusals))
