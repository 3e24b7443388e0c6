"""The fields of an .onnx file, looked at before anything allocates by them or hands them to native code.

A file can hold any number in any field. Each check here is about what the format itself says: text in UTF-8, element
types that exist, as many bytes as the dimensions ask for, one version of each operator set. What operators mean is
the business of the checker.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
)

from passes.base import PassError

NAME, DOCUMENT = 4096, 64 << 20
"""Bytes of a name, and of any other text (metadata can be a model of its own)."""
AXES = 64
"""Axes of a tensor; numpy ends here, and a backbone has six."""
LARGEST = 1 << 31
"""Elements along one axis of an input."""
EXPANDED = 1 << 20
"""Nodes of the model when every call of a function is written out."""
_NAMES = frozenset(
    {
        "name",
        "input",
        "output",
        "op_type",
        "domain",
        "overload",
        "dim_param",
        "ref_attr_name",
        "key",
        "attribute",
    }
)
_NUMBER = re.compile(r"[0-9]{1,18}")
_PACKED = frozenset({TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1})
_FIX = ". Fix: export the model again, or get it from a source that you trust"
_EQUATION = re.compile(r"\s*(?:[A-Za-z]|\.\.\.|,|\s)*(?:->(?:[A-Za-z]|\.\.\.|\s)*)?")


def check_fields(model: ModelProto, where: object) -> None:
    """Raise PassError that begins with `where` and names the first field that cannot be."""
    try:
        _check_texts(model)
        _check_opsets(model)
        _check_functions(model)
        for value in model.graph.input:
            _check_input(value)
        for part in (model.graph, *model.functions):
            _check_part(part)
    except _Wrong as error:
        raise PassError(f"{where}: {error}{_FIX}") from error


Key = tuple[str, str, str]
"""What a call names: domain, function and overload."""


class _Wrong(Exception):
    """What is wrong with a field."""


def shown(name: object) -> str:
    """A name for a message: no longer than 80 characters, whatever it holds."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_texts(message: Any) -> None:
    """Every text below a message is UTF-8, and names are short."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if hasattr(value, "ListFields") else value:
                _check_texts(part)
        elif field.type == field.TYPE_STRING:
            limit = NAME if field.name in _NAMES else DOCUMENT
            for text in (value,) if isinstance(value, str | bytes) else value:
                if isinstance(text, bytes):  # protobuf gives what it cannot decode as it is
                    raise _Wrong(f"{field.name} {shown(text)} is not text in UTF-8")
                if len(text) > limit:
                    raise _Wrong(
                        f"{field.name} {shown(text)} has {len(text)} characters, and {limit} are allowed"
                    )


def _check_opsets(model: ModelProto) -> None:
    for part in (model, *model.functions):
        counted = Counter("" if item.domain == "ai.onnx" else item.domain for item in part.opset_import)
        for domain, count in counted.items():
            if count > 1:
                raise _Wrong(f"it imports {count} versions of the operator set {shown(domain)}")
    for item in model.opset_import:
        if not 0 < item.version < 1 << 31:
            raise _Wrong(f"version {item.version} of the operator set {shown(item.domain)} does not exist")


def _check_functions(model: ModelProto) -> None:
    """Functions do not call themselves, and written out they make no more than EXPANDED nodes."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    if len(functions) != len(model.functions):
        raise _Wrong("it has two functions of one name")
    if len(functions) > 10_000:
        raise _Wrong(f"it has {len(functions)} functions")
    _check_ends(functions)
    sizes: dict[Key, int] = {}

    def size(nodes: Iterable[NodeProto]) -> int:
        total = 0
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in functions and key not in sizes:
                sizes[key] = size(functions[key].node)
            total += sizes.get(key, 0) + 1 + sum(size(body.node) for body in _bodies(node))
            if total > EXPANDED:
                raise _Wrong(f"its functions, written out, have more than {EXPANDED} nodes")
        return total

    for part in (model.graph, *model.functions) if functions else ():
        size(part.node)


def _check_ends(functions: dict[Key, FunctionProto]) -> None:
    """Raise _Wrong for a chain of calls that is deeper than Python's own."""
    left = {
        key: {k for n in _nodes(f) if (k := (n.domain, n.op_type, n.overload)) in functions}
        for key, f in functions.items()
    }
    for _ in range(200):
        done = {key for key, calls in left.items() if not calls}
        if not done:
            break
        left = {key: calls - done for key, calls in left.items() if calls}
    if left:
        raise _Wrong(
            f"the functions {shown(next(iter(left))[1])} and others call each other in a circle, or too deep"
        )


def _nodes(part: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    for node in part.node:
        yield node
        for body in _bodies(node):
            yield from _nodes(body)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _check_part(part: GraphProto | FunctionProto) -> None:
    if isinstance(part, GraphProto):
        names = Counter(tensor.name for tensor in part.initializer)
        doubled = next((name for name, count in names.items() if count > 1), None)
        if doubled is not None:
            raise _Wrong(f"it has two weights called {shown(doubled)}")
        for tensor in part.initializer:
            _check_tensor(tensor, "weight")
        for sparse in part.sparse_initializer:
            _check_sparse(sparse)
    for node in part.node:
        _check_node(node)


def _check_node(node: NodeProto) -> None:
    if not node.op_type:
        raise _Wrong(f"node {shown(node.name)} has no operator")
    if not any(node.output):
        raise _Wrong(f"node {shown(node.name)} ({shown(node.op_type)}) has no output")
    given = Counter(attribute.name for attribute in node.attribute)
    if given and max(given.values()) > 1:
        raise _Wrong(f"node {shown(node.name)} ({shown(node.op_type)}) has an attribute twice")
    if node.op_type in _ATTRIBUTES and node.domain in ("", "ai.onnx"):
        _ATTRIBUTES[node.op_type](node)
    for attribute in node.attribute:
        held = _HELD.get(attribute.type)
        if held is not None and not attribute.ref_attr_name and not attribute.HasField(held):
            raise _Wrong(
                f"attribute {shown(attribute.name)} of node {shown(node.name)} does not hold what its type says"
            )
        for tensor in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else ())):
            _check_tensor(tensor, f"attribute {shown(attribute.name)} of node {shown(node.name)}, tensor")
        for sparse in (
            *attribute.sparse_tensors,
            *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else ()),
        ):
            _check_sparse(sparse)
    for body in _bodies(node):
        _check_part(body)


_HELD = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}
"""The kinds of attributes that hold a message, and the field that it is in."""


def _check_einsum(node: NodeProto) -> None:
    """An equation of letters: ONNX's own inference does not come back from some others ("......")."""
    equation = next((a.s for a in node.attribute if a.name == "equation"), b"").decode("latin-1")
    terms = equation.replace("->", ",").split(",")
    if not _EQUATION.fullmatch(equation) or any(term.count("...") > 1 or "...." in term for term in terms):
        raise _Wrong(f"node {shown(node.name)}: {shown(equation)} is not an equation of Einsum")


def _check_split(node: NodeProto) -> None:
    parts = next((a.i for a in node.attribute if a.name == "num_outputs"), len(node.output))
    if parts != len(node.output):
        raise _Wrong(f"node {shown(node.name)} (Split) makes {parts} outputs, and has {len(node.output)}")


_ATTRIBUTES: dict[str, Callable[[NodeProto], None]] = {"Einsum": _check_einsum, "Split": _check_split}
"""Attributes that ONNX's own checker follows without a limit."""


def _check_input(value: onnx.ValueInfoProto) -> None:
    what = f"input {shown(value.name)}"
    kind = value.type.WhichOneof("value")
    if kind is None:
        raise _Wrong(f"{what} has no type")
    if kind == "tensor_type":
        _check_type(value.type, what)


def _check_type(kind: TypeProto, what: str) -> None:
    tensor = kind.tensor_type
    _known_bits(tensor.elem_type, what)
    if len(tensor.shape.dim) > AXES:
        raise _Wrong(f"{what} has {len(tensor.shape.dim)} axes, and {AXES} are allowed")
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and not 0 <= dim.dim_value <= LARGEST:
            raise _Wrong(f"{what} has a dimension of {dim.dim_value}")


def _known_bits(dtype: int, what: str) -> int:
    """Bits of an element; 0 for texts. Raises _Wrong for a type that is none, or that arrays cannot have."""
    if dtype == TensorProto.STRING:
        return 0
    if dtype in _PACKED:
        return 4
    try:
        return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype)).itemsize) * 8
    except (KeyError, TypeError, ValueError) as error:
        raise _Wrong(f"{what} has element type {dtype}, which does not exist or cannot be read") from error


def _check_tensor(tensor: TensorProto, kind: str) -> None:
    what = f"{kind} {shown(tensor.name)}"
    bits = _known_bits(tensor.data_type, what)
    if len(tensor.dims) > AXES or any(not 0 <= n < 1 << 62 for n in tensor.dims):
        raise _Wrong(f"{what} has dimensions {shown(list(tensor.dims))}")
    count = math.prod(tensor.dims)
    if count >= 1 << 62:
        raise _Wrong(f"{what} has {count} elements")
    if tensor.HasField("segment"):
        raise _Wrong(f"{what} is a segment of a tensor")
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_place(tensor, what)
    elif bits:
        _check_bytes(tensor, count, bits, what)


def _check_place(tensor: TensorProto, what: str) -> None:
    for entry in tensor.external_data:
        if entry.key in ("offset", "length") and not _NUMBER.fullmatch(entry.value):
            raise _Wrong(f"the {entry.key} {shown(entry.value)} of {what} is not a number of bytes")


def _check_bytes(tensor: TensorProto, count: int, bits: int, what: str) -> None:
    if tensor.HasField("raw_data"):
        wanted, there = (count * bits + 7) // 8, len(tensor.raw_data)
        if there != wanted:
            raise _Wrong(f"{what} {list(tensor.dims)} has {there} bytes, and its dimensions ask for {wanted}")
        return
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    wanted = (count + 1) // 2 if tensor.data_type in _PACKED else count
    wanted *= 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    there = len(getattr(tensor, field))
    if there != wanted:
        raise _Wrong(f"{what} {list(tensor.dims)} has {there} values, and its dimensions ask for {wanted}")


def _check_sparse(sparse: SparseTensorProto) -> None:
    what = f"sparse weight {shown(sparse.values.name)}"
    _check_tensor(sparse.values, what)
    _check_tensor(sparse.indices, what)
    if len(sparse.dims) > AXES or any(not 0 < n <= LARGEST for n in sparse.dims) or not sparse.dims:
        raise _Wrong(f"{what} has dimensions {shown(list(sparse.dims))}")
    if math.prod(sparse.dims) > 1 << 28:
        raise _Wrong(f"{what} has {math.prod(sparse.dims)} elements when it is written out")
    if len(sparse.values.dims) != 1 or sparse.indices.data_type != TensorProto.INT64:
        raise _Wrong(f"{what} is not a list of values with their places")
