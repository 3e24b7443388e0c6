"""Element types of all tensors from the operators' schemas, in one sweep: for graphs that ONNX's own inference refuses.

ONNX infers nothing after a node whose inputs disagree, which is where types are needed most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.defs import OpSchema

from passes.base import PassError, walk
from passes.graph.grids import quantized_type
from passes.graph.match import STANDARD, constant_value
from passes.weights.recipe import dtype_of

OPSET = 23
"""Schemas of the canonical opset. Type constraints only ever grew, so they serve the older ones, too."""
FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
HALVES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})

FLOAT_TYPES = {
    "float32": int(onnx.TensorProto.FLOAT),
    "float16": int(onnx.TensorProto.FLOAT16),
    "bfloat16": int(onnx.TensorProto.BFLOAT16),
}
"""Floating-point types by the names that pass options use."""


def float_type(name: str) -> int:
    """The onnx.TensorProto element type called `name`. Raises PassError that lists the known ones."""
    if name not in FLOAT_TYPES:
        raise PassError(f"unknown type {name!r}. Known: {', '.join(FLOAT_TYPES)}")
    return FLOAT_TYPES[name]


def compute_type(graph: gs.Graph) -> int:
    """The graph's compute type: the 16-bit type of its inputs, else of most of its constants, else FLOAT."""
    for tensors in (graph.inputs, constants(graph), graph.outputs):
        found = [dtype for dtype in map(dtype_of, tensors) if dtype in HALVES]
        if found:
            return max(sorted(set(found)), key=found.count)
    return int(TensorProto.FLOAT)


@cache
def schema_of(op: str) -> OpSchema | None:
    """The schema of a default-domain operator in the canonical opset; None where it has none."""
    try:
        return onnx.defs.get_schema(op, OPSET, "")
    except onnx.defs.SchemaError:
        return None


@dataclass(frozen=True)
class Slot:
    """An input of a node: its place, and the name of its type variable or its fixed type."""

    index: int
    type_str: str


def slots(node: gs.Node, schema: OpSchema) -> Iterator[Slot]:
    """The inputs that are there. Inputs of one type variable must agree, unless it is heterogeneous."""
    for index, tensor in enumerate(node.inputs):
        if tensor.is_empty() or not schema.inputs:
            continue
        parameter = schema.inputs[min(index, len(schema.inputs) - 1)]
        if parameter.is_homogeneous or index < len(schema.inputs) - 1:
            yield Slot(index, parameter.type_str)


def set_output_types(node: gs.Node) -> None:
    """Give the outputs of a default-domain node the types that follow from its inputs and attributes.

    Outputs of other domains and of operators without a schema keep what they have.
    """
    if node.domain not in STANDARD:
        return
    special, schema = _SPECIAL.get(node.op), schema_of(node.op)
    if special is not None:
        types = [special(node)] * len(node.outputs)
    elif node.op in ("If", "Loop", "Scan"):
        types = _body_types(node)
    elif schema is not None:
        types = [_of_schema(node, schema, index) for index in range(len(node.outputs))]
    else:
        return
    for tensor, dtype in zip(node.outputs, types, strict=False):
        if dtype is not None and not tensor.is_empty():
            tensor.dtype = int(dtype)


def fixed_type(type_str: str) -> int | None:
    """The type that "tensor(float)" names; None for a type variable."""
    if not type_str.startswith("tensor("):
        return None
    return int(TensorProto.DataType.Value(type_str[len("tensor(") : -1].upper()))


def _of_schema(node: gs.Node, schema: OpSchema, index: int) -> int | None:
    parameter = schema.outputs[min(index, len(schema.outputs) - 1)]
    fixed = fixed_type(parameter.type_str)
    if fixed is not None:
        return fixed
    for slot in slots(node, schema):
        if slot.type_str == parameter.type_str:
            return dtype_of(node.inputs[slot.index])
    allowed = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == parameter.type_str]
    return fixed_type(allowed[0][0]) if allowed and len(allowed[0]) == 1 else None


def _body_types(node: gs.Node) -> list[int | None]:
    """Types of the results of the first body; a Loop's body also returns its condition."""
    body = next((value for value in node.attrs.values() if isinstance(value, gs.Graph)), None)
    if body is None:
        return []
    return [dtype_of(t) for t in body.outputs[1 if node.op == "Loop" else 0 :]]


def _dequantized(node: gs.Node) -> int | None:
    return node.attrs.get("output_dtype") or dtype_of(node.inputs[1])


def _named(key: str, default: int | None) -> Callable[[gs.Node], int | None]:
    """The type that an attribute names, else `default`."""

    def read(node: gs.Node) -> int | None:
        value = node.attrs.get(key, default)
        if value is None or isinstance(value, int):
            return value or default
        return int(onnx.helper.np_dtype_to_tensor_dtype(value))

    return read


def _held(node: gs.Node) -> int | None:
    value = node.attrs.get("value")
    return dtype_of(value) if value is not None else None


def _of_constant(node: gs.Node) -> int | None:
    """The type of what a Constant holds, as a tensor or as numbers in an attribute."""
    if "value" in node.attrs:
        return _held(node)
    array = constant_value(node)
    return None if array is None else int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


_SPECIAL: dict[str, Callable[[gs.Node], int | None]] = {
    "Cast": _named("to", None),
    "CastLike": lambda node: dtype_of(node.inputs[1]),
    "Constant": _of_constant,
    "ConstantOfShape": lambda node: _held(node) or int(TensorProto.FLOAT),
    "DequantizeLinear": _dequantized,
    "QuantizeLinear": lambda node: quantized_type(node) or None,
    "RandomNormal": _named("dtype", int(TensorProto.FLOAT)),
    "RandomUniform": _named("dtype", int(TensorProto.FLOAT)),
    "RandomNormalLike": lambda node: _named("dtype", dtype_of(node.inputs[0]))(node),
    "EyeLike": lambda node: _named("dtype", dtype_of(node.inputs[0]))(node),
    "HannWindow": _named("output_datatype", int(TensorProto.FLOAT)),
}


def constants(graph: gs.Graph) -> list[gs.Constant]:
    """Every constant of the graph and its subgraphs, once."""
    found = {id(t): t for part in walk(graph) for t in part.tensors().values() if isinstance(t, gs.Constant)}
    return list(found.values())
