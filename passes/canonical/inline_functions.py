"""inline-functions: calls of model-local functions become the nodes of the functions."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import onnx.inliner
import onnx_graphsurgeon as gs
from onnx import ModelProto

from passes.base import Pass, PassResult, Refusal, register
from passes.graph.from_onnx import import_graph, name_nodes
from passes.graph.inference import infer_types, nodes_of
from passes.graph.to_onnx import export_model
from passes.graph.trt_ops import trt_op
from passes.weights.recipe import default_opset


@register
@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace calls of functions by what the functions hold, so that the other passes see all of the graph.

    before: y = blocks.ResnetBlock(x, w)      after: n = GroupNormalization(x, ...), ..., y = Conv(c, w)

    Overloads, functions that call functions, and calls in bodies included. The nodes keep the names that they have in
    the function, with a number of the call.

    Declines when: a function is of another opset than the model (rewrite-opset makes them equal). Functions that stand
    for operators of TensorRT stay (add-trt-functions).
    """

    name: ClassVar[str] = "inline-functions"

    def run(self, graph: gs.Graph) -> PassResult:
        """Let onnx's own inliner do it, and take over the graph that it makes."""
        functions = [f for f in graph.functions if not trt_op(f.domain, f.name)]
        other = [f for f in functions if default_opset(f.import_domains) not in (None, graph.opset)]
        refusals = tuple(
            Refusal(f"{f.domain}::{f.name}", f"it is of opset {f.opset}, and the model of {graph.opset}")
            for f in other
        )
        names = {(f.domain, f.name) for f in functions} - {(f.domain, f.name) for f in other}
        if not names:
            return PassResult(refusals=refusals)
        model = export_model(graph)
        # The inliner rejects a model that has any function of another opset.
        rest = [f for f in model.functions if (f.domain, f.name) not in names]
        whole = [f for f in model.functions if (f.domain, f.name) in names]
        del model.functions[:]
        model.functions.extend(whole)
        inlined = onnx.inliner.inline_selected_functions(model, sorted(names))
        inlined.functions.extend(rest)
        # The graph object is the runner's, so it stays; what it holds is new.
        made = import_graph(infer_types(inlined))
        name_nodes(made)
        graph.nodes, graph.inputs, graph.outputs = made.nodes, made.inputs, made.outputs
        graph.functions, graph.import_domains = made.functions, made.import_domains
        changed = _count_calls(model, names) + len(names)
        return PassResult(changed, (f"{changed - len(names)} calls of {len(names)} functions",), refusals)


def _count_calls(model: ModelProto, names: Set[tuple[str, str]]) -> int:
    """How many nodes of the main graph and its bodies call one of the functions."""
    return sum((node.domain, node.op_type) in names for node in nodes_of(model.graph))
