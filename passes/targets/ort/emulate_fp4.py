"""emulate-fp4: FLOAT4E2M1 kept in FLOAT8E4M3FN, for runtimes without 4-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassError, PassResult, register, walk
from passes.graph.trt_ops import DOMAIN
from passes.targets.ort.widen_types import retype, retype_attributes
from passes.weights.recipe import dtype_of

_FP4, _FP8 = int(TensorProto.FLOAT4E2M1), int(TensorProto.FLOAT8E4M3FN)
_QUANTIZER = "TRT_FP4DynamicQuantize"


@register
@dataclass(frozen=True)
class EmulateFp4(Pass):
    """Let everything of type FLOAT4E2M1 have type FLOAT8E4M3FN, which holds each of its 16 values exactly.

    1. Graph input, output or intermediate tensor, constant (inline, recipe, in an attribute) -> of that type.
    2. Attribute of DequantizeLinear or of another operator that names the type -> names FLOAT8E4M3FN.
    3. trt::TRT_FP4DynamicQuantize -> the same with `output_dtype`: its function still rounds to E2M1.

    The graph computes the same numbers. It is for validation and ONNX Runtime on CPU, with add-trt-functions after it,
    and no longer for TensorRT. It comes after the passes that fold weights.

    Raises PassError where QuantizeLinear or Cast rounds to FLOAT4E2M1: with the other type it would round less.
    """

    name: ClassVar[str] = "emulate-fp4"
    changes_types: ClassVar[bool] = True

    def run(self, graph: gs.Graph) -> PassResult:
        """Change types in place; the graph keeps its nodes."""
        parts = list(walk(graph))
        for node in (node for part in parts for node in part.nodes):
            _check(node)
        changed = 0
        for part in parts:
            tensors = {id(t): t for t in (*part.inputs, *part.outputs, *part.tensors().values())}
            changed += sum(retype(tensor, _FP4, _FP8) for tensor in tensors.values())
            changed += sum(retype_attributes(node, _FP4, _FP8) for node in part.nodes)
            changed += sum(_mark(node) for node in part.nodes)
        notes = (f"{changed} tensors and attributes from FLOAT4E2M1 to FLOAT8E4M3FN",) if changed else ()
        return PassResult(changed, notes)


def _check(node: gs.Node) -> None:
    if node.op not in ("QuantizeLinear", "Cast", "CastLike"):
        return
    if any(dtype_of(tensor) == _FP4 for tensor in node.outputs):
        raise PassError(
            f"{node.op} node {node.name!r} rounds to FLOAT4E2M1, which FLOAT8E4M3FN cannot stand for."
            " Fix: run fold-weight-qdq first if it works on a weight"
        )


def _mark(node: gs.Node) -> bool:
    """Say the values' type at a dynamic quantizer; whether it was not said yet."""
    if (node.domain, node.op) != (DOMAIN, _QUANTIZER) or node.attrs.get("output_dtype") == _FP8:
        return False
    node.attrs["output_dtype"] = _FP8
    return True
