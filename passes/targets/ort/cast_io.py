"""cast-io: graph inputs and outputs in the types that a caller feeds and reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register
from passes.graph.edit import Edit
from passes.graph.types import FLOAT_TYPES
from passes.weights.recipe import dtype_of

_TYPES = FLOAT_TYPES | {"int32": int(onnx.TensorProto.INT32), "int64": int(onnx.TensorProto.INT64)}


@register
@dataclass(frozen=True)
class CastIo(Pass):
    """Give graph inputs and outputs other element types; the graph inside keeps its own.

    `values` are `name:type` pairs, types float32, float16, bfloat16, int32 and int64.
    1. Input of another type -> input of that type, of the same name, followed by a Cast.
    2. Output of another type -> a Cast that makes an output of that type, of the same name.

    Declines when: an input is an output as well, which a Cast would make two of. Exact when the type holds
    every value that passes (positions as int64, bfloat16 as float32); otherwise it rounds once at the border, which
    is the tolerance.
    """

    name: ClassVar[str] = "cast-io"
    tolerance: ClassVar[float] = 1e-2
    changes_types: ClassVar[bool] = True
    values: tuple[str, ...] = ()

    def run(self, graph: gs.Graph) -> PassResult:
        """Insert Casts at the borders of the main graph. Raises PassError for a name or type that is unknown."""
        wanted = dict(_pair(text) for text in self.values)
        known = {t.name for t in (*graph.inputs, *graph.outputs)}
        if strange := sorted(set(wanted) - known):
            raise PassError(
                f"cast-io: no input or output is called {strange[0]!r}. Known: {', '.join(sorted(known))}"
            )
        both = {id(t) for t in graph.inputs} & {id(t) for t in graph.outputs}
        edit, done = Edit(graph), list[str]()
        for tensor in {id(t): t for t in (*graph.inputs, *graph.outputs)}.values():
            to = wanted.get(tensor.name)
            if to is None or dtype_of(tensor) == to:
                continue
            if id(tensor) in both:
                edit.decline(tensor, "it is an input and an output")
                continue
            done.append(tensor.name)
            (_cast_input if _is_input(graph, tensor) else _cast_output)(graph, tensor, to, edit)
        result = edit.finish({"values": len(done)})
        return replace(result, notes=(f"cast {', '.join(done)}",) if done else ())


def _pair(text: str) -> tuple[str, int]:
    name, _, kind = text.rpartition(":")
    if not name or kind not in _TYPES:
        raise PassError(f"cast-io: {text!r} is not written as name:type. Types: {', '.join(_TYPES)}")
    return name, _TYPES[kind]


def _is_input(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(item is tensor for item in graph.inputs)


def _np_type(to: int) -> np.dtype[np.generic]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))


def _cast_input(graph: gs.Graph, tensor: gs.Tensor, to: int, edit: Edit) -> None:
    """x -> all its readers  ->  x of the new type -> Cast to the old one -> all its readers"""
    names = edit.names
    if tensor.outputs:
        inner = gs.Variable(names.fresh(f"{tensor.name}_inside"), tensor.dtype, tensor.shape)
        edit.replace_uses(tensor, inner)
        own = {"to": dtype_of(tensor)}
        graph.nodes.insert(0, gs.Node("Cast", names.fresh(f"{tensor.name}/Cast"), own, [tensor], [inner]))
    tensor.dtype = _np_type(to)


def _cast_output(graph: gs.Graph, tensor: gs.Tensor, to: int, edit: Edit) -> None:
    """y = Op(x)  ->  y = Cast(y_inside), y_inside = Op(x), which keeps the readers that y had"""
    names = edit.names
    name, tensor.name = tensor.name, names.fresh(f"{tensor.name}_inside")
    outer = gs.Variable(name, _np_type(to), tensor.shape)
    graph.nodes.append(gs.Node("Cast", names.fresh(f"{name}/Cast"), {"to": to}, [tensor], [outer]))
    graph.outputs = [outer if item is tensor else item for item in graph.outputs]
