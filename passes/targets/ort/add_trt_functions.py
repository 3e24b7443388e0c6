"""add-trt-functions: TensorRT's operators with a body, so that any ONNX runtime computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

from passes.base import Pass, PassError, PassResult, Refusal, register, walk
from passes.graph.trt_ops import DOMAIN, TRT_OPS, is_trt
from passes.targets.ort.trt_functions import function

_OLDEST = 21  # QuantizeLinear has blocks and `output_dtype`, and ONNX 4-bit integers


@register
@dataclass(frozen=True)
class AddTrtFunctions(Pass):
    """Give the model a function of standard operators for each of TensorRT's operators that it uses.

    1. An operator of domain `trt` that the graph or a subgraph uses, and that has no function yet -> one is added.
       It computes in float32 whatever the input type, bit for bit as the recipes of weights do.
    2. With `remove`: every function of such an operator is taken out again; TensorRT and its execution provider
       in ONNX Runtime have kernels of their own.

    The nodes stay as they are. ONNX Runtime on CPU has no FLOAT4E2M1: `emulate-fp4` before this pass.

    Declines when: a node's attributes ask for what the function does not do, which are blocks along another axis than
    the last and block scales of another type. Raises PassError below opset 21.
    """

    name: ClassVar[str] = "add-trt-functions"
    remove: bool = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Change the model's functions only."""
        if self.remove:
            return _remove(graph)
        used = [node for part in walk(graph) for node in part.nodes if is_trt(node)]
        refusals = [Refusal(node.name, why) for node in used if (why := _reason(node))]
        refused = {node.op for node in used if _reason(node)}
        present = {item.name for item in graph.functions if item.domain == DOMAIN}
        wanted = sorted({node.op for node in used} - refused - present)
        if wanted and graph.opset < _OLDEST:
            raise PassError(
                f"add-trt-functions needs opset {_OLDEST} or later, and the model has {graph.opset}."
                " Fix: run rewrite-opset first"
            )
        graph.functions = [*graph.functions, *(_function(op, used, graph) for op in wanted)]
        notes = (f"functions for {', '.join(wanted)}",) if wanted else ()
        return PassResult(len(wanted), notes, tuple(refusals))


def _remove(graph: gs.Graph) -> PassResult:
    kept = [item for item in graph.functions if item.domain != DOMAIN or item.name not in TRT_OPS]
    changed = len(graph.functions) - len(kept)
    graph.functions = kept
    return PassResult(changed, (f"{changed} functions removed",) if changed else ())


def _function(op: str, used: list[gs.Node], graph: gs.Graph) -> gs.Function:
    """The function of `op` with the attributes and inputs that its nodes have."""
    nodes = [node for node in used if node.op == op]
    attributes = {key for node in nodes for key in node.attrs}
    made = function(op, graph.opset, attributes, max(len(node.inputs) for node in nodes))
    return OnnxImporter.import_function(made, graph.opset, graph.import_domains)


def _reason(node: gs.Node) -> str:
    """Why the function of the node's operator would not compute what the node asks for, or nothing."""
    axis = node.attrs.get("axis", -1)
    shape = node.inputs[0].shape
    if TRT_OPS[node.op].block_size and axis != -1 and (shape is None or axis != len(shape) - 1):
        return f"its blocks lie along axis {axis}, and the function of {node.op} takes the last"
    scale_type = node.attrs.get("scale_type", TensorProto.FLOAT8E4M3FN)
    if scale_type != TensorProto.FLOAT8E4M3FN:
        return f"its block scales are {TensorProto.DataType.Name(scale_type)}; the function has FLOAT8E4M3FN"
    return ""
