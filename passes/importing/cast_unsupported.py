"""cast-unsupported: operators for which ONNX has no bfloat16 compute in float32, or are written as one that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.match import STANDARD
from passes.weights.recipe import dtype_of

_BF16, _FLOAT = int(TensorProto.BFLOAT16), int(TensorProto.FLOAT)
_OPSET = 23
"""The opset of canonical graphs."""
_MOVED = "Einsums that only move axes are Transposes"
_CAST = "nodes compute in float32, since ONNX has no bfloat16 for them"


@register
@dataclass(frozen=True)
class CastUnsupported(Pass):
    """Make nodes valid whose inputs are bfloat16 and whose schema does not take it. Exporters write such nodes.

    1. Einsum<"nhwpqc->nchpwq">(x), which only moves axes  ->  Transpose<perm>(x)
    2. Op(x)  ->  Cast<bfloat16>(Op(Cast<float32>(x)))

    Types of all tensors must be known (match-types finds them). Bodies of If, Loop and Scan stand as they are.
    """

    name: ClassVar[str] = "cast-unsupported"
    tolerance: ClassVar[float] = 1e-5

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every node once."""
        edit = Edit(graph)
        counts = {_MOVED: 0, _CAST: 0}
        for node in (node for part in edit.view.parts for node in part.nodes):
            if not _unsupported(node):
                continue
            if (perm := _permutation(node)) is not None:
                # Einsum<"nhwpqc->nchpwq">(x)  ->  Transpose<perm>(x)
                node.op, node.attrs = "Transpose", {"perm": perm}
                counts[_MOVED] += 1
            else:
                _cast_around(node, edit)
                counts[_CAST] += 1
        return edit.finish(counts)


def _unsupported(node: gs.Node) -> bool:
    """Whether an input is bfloat16 where the schema has no such type."""
    if node.domain not in STANDARD or not onnx.defs.has(node.op, _OPSET, ""):
        return False
    schema = onnx.defs.get_schema(node.op, _OPSET, "")
    if not schema.inputs or len(node.outputs) != 1:
        return False
    return any(
        dtype_of(tensor) == _BF16
        and "tensor(bfloat16)" not in schema.inputs[min(index, len(schema.inputs) - 1)].types
        for index, tensor in enumerate(node.inputs)
        if not tensor.is_empty()
    )


def _permutation(node: gs.Node) -> list[int] | None:
    """Where the axes of a one-input Einsum come from; None for one that sums, repeats or spreads axes."""
    if node.op != "Einsum" or len(node.inputs) != 1:
        return None
    source, arrow, target = node.attrs["equation"].replace(" ", "").partition("->")
    distinct = len(set(source)) == len(source) and sorted(source) == sorted(target)
    return [source.index(letter) for letter in target] if arrow and distinct and source.isalpha() else None


def _cast_around(node: gs.Node, edit: Edit) -> None:
    """Op(x)  ->  Cast<bfloat16>(Op(Cast<float32>(x)))"""
    before = edit.at(node)
    for index, tensor in enumerate(node.inputs):
        if not tensor.is_empty() and dtype_of(tensor) == _BF16:
            node.inputs[index] = before.emit("Cast", [tensor], _FLOAT, to=_FLOAT)
    (output,) = node.outputs
    if dtype_of(output) not in (None, _BF16):
        return
    wide = gs.Variable(edit.names.fresh(f"{node.name}/wide_out"), dtype=_FLOAT, shape=output.shape)
    node.outputs = [wide]
    output.dtype = _BF16
    narrow = gs.Node("Cast", edit.names.fresh(f"{node.name}/narrow"), {"to": _BF16}, [wide], [output])
    edit.at(node, after=True).nodes.append(narrow)
