"""Values inside an .onnx file that cannot be right: NaN in a weight, scales of zero, operators that nothing runs.

Weights that lie beside the graph are looked at when they are read (`passes.weights.finite`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from diffc.errors import DiffcError
from diffc.frontend.onnx_interface import graphs_of
from passes.graph.trt_ops import DOMAIN
from passes.weights.recipe import Array

CONTRIB = "com.microsoft"
_SCALED = ("", "ai.onnx", CONTRIB, DOMAIN)
_FIX = "export the model again"


def check_values(model: ModelProto, where: object) -> None:
    """Raise DiffcError that names the first weight with NaN, and the first quantizer with a scale that is none."""
    for graph in graphs_of(model.graph):
        held = {tensor.name: tensor for tensor in _held(graph)}
        for tensor in held.values():
            array = _array(tensor)
            # A single NaN is what exporters compare with or fill in.
            if array is not None and array.size > 1 and np.isnan(array.astype(np.float32)).any():
                raise DiffcError(f"{where}: the weight {tensor.name!r} holds NaN", fix=_FIX)
        for node in graph.node:
            if node.op_type.endswith("QuantizeLinear") and node.domain in _SCALED and len(node.input) > 1:
                _check_scale(node, held.get(node.input[1]), held.get(node.input[0]), where)


def _held(graph: GraphProto) -> Iterator[TensorProto]:
    """Initializers, and values of Constant nodes under the names of their outputs."""
    yield from graph.initializer
    for node in graph.node:
        value = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if node.op_type == "Constant" and value is not None and node.output:
            named = TensorProto()
            named.CopyFrom(value)
            named.name = node.output[0]
            yield named


def _array(tensor: TensorProto) -> Array | None:
    """The values of a float tensor that are in the graph; None for others."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.data_type not in _FLOATS:
        return None
    return numpy_helper.to_array(tensor)


_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def _check_scale(node: NodeProto, scale: TensorProto | None, data: TensorProto | None, where: object) -> None:
    values = None if scale is None else _array(scale)
    if scale is None or values is None:
        return
    name = f"the scale {scale.name!r} of {node.op_type} {node.name!r}"
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all() or not (wide > 0).all():
        raise DiffcError(f"{where}: {name} holds {wide.min():g}; scales are finite and above zero", fix=_FIX)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    blocks = any(a.name == "block_size" and a.i for a in node.attribute)
    if data is None or blocks or values.ndim != 1 or values.size == 1:
        return
    rank = len(data.dims)
    if not -rank <= axis < rank or data.dims[axis] != values.size:
        told = f"{name} has {values.size} values for axis {axis} of a weight {list(data.dims)}"
        raise DiffcError(f"{where}: {told}", fix=_FIX)


@cache
def contrib_operators() -> frozenset[str]:
    """The operators of ONNX Runtime beside ONNX's own; empty where it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return frozenset()
    return frozenset(schema.name for schema in state.get_all_operator_schema() if schema.domain == CONTRIB)
