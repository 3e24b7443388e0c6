"""What a backend reads from an .onnx file before it starts: inputs, element types, whole weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo

from diffc.errors import DiffcError
from passes.base import PassError
from passes.graph.onnx_reader import all_tensors, external_file, read_proto

# Operators of TensorRT that hide their element type: ONNX sees them as untyped.
_TYPED_OPS = {
    "TRT_FP8QuantizeLinear": TensorProto.FLOAT8E4M3FN,
    "TRT_FP8DequantizeLinear": TensorProto.FLOAT8E4M3FN,
    "TRT_MXFP8DynamicQuantize": TensorProto.FLOAT8E8M0,
    "TRT_MXFP8DequantizeLinear": TensorProto.FLOAT8E8M0,
    "TRT_FP4DynamicQuantize": TensorProto.FLOAT4E2M1,
}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True)
class GraphInput:
    """A graph input: its onnx.TensorProto element type, and its dims, None where dynamic."""

    name: str
    dtype: int
    dims: tuple[int | None, ...]


def read(path: Path) -> onnx.ModelProto:
    """The model without its weights. Raises DiffcError when it or its external data is missing or cut off."""
    try:
        model = read_proto(path)
    except PassError as error:
        raise DiffcError(str(error)) from error
    if not model.graph.output:
        raise DiffcError(
            f"{path} holds no graph with outputs: not an ONNX model",
            fix="name an .onnx file that has a model",
        )
    for tensor in all_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, path)
    return model


def _check_external(tensor: TensorProto, path: Path) -> None:
    info, file = ExternalDataInfo(tensor), external_file(path, tensor)
    size = file.stat().st_size if file.is_file() else None
    end = (info.offset or 0) + (info.length or 0)
    if size is None or size < end:
        state = "is missing" if size is None else f"is cut off: {size} bytes, of which byte {end} is needed"
        raise DiffcError(f"{file} {state} (weight {tensor.name!r})", fix="compile the model again")


def graph_inputs(model: onnx.ModelProto) -> list[GraphInput]:
    """The inputs that a caller must feed, in graph order."""
    weights = {t.name for t in model.graph.initializer}
    return [_graph_input(v) for v in model.graph.input if v.name not in weights]


def _graph_input(value: onnx.ValueInfoProto) -> GraphInput:
    kind = value.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
    return GraphInput(value.name, kind.elem_type, dims)


def element_types(model: onnx.ModelProto) -> set[int]:
    """Every onnx.TensorProto element type in weights, values, casts, quantizers and functions."""
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    types = {v.type.tensor_type.elem_type for v in values}
    types |= set(_types_of(model.graph.node)) | {t.data_type for t in model.graph.initializer}
    for function in model.functions:
        types |= set(_types_of(function.node))
    return types - {TensorProto.UNDEFINED}


def compute_type(model: onnx.ModelProto) -> str:
    """The type that a graph computes in: a 16-bit one that it holds, else float32."""
    types = element_types(model)
    if TensorProto.FLOAT16 in types:
        return "float16"
    return "bfloat16" if TensorProto.BFLOAT16 in types else "float32"


def _types_of(nodes: object) -> Iterator[int]:
    for node in nodes:  # type: ignore[attr-defined]  # a protobuf container, generic only in its stubs
        if node.op_type in _TYPED_OPS:
            yield _TYPED_OPS[node.op_type]
        for attribute in node.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.type == onnx.AttributeProto.INT:
                yield attribute.i
            if attribute.HasField("t"):
                yield attribute.t.data_type
            for graph in [attribute.g, *attribute.graphs]:
                yield from (t.data_type for t in graph.initializer)
                yield from _types_of(graph.node)
