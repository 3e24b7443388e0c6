"""Types and shapes that ONNX infers: on models whose weights are recipes, inside bodies, and inside functions.

Recipes hold no data, and ONNX's checker and inference want data. Both work on a *shell*: a copy in which every
initializer without values in memory is an input of the model.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from graphlib import TopologicalSorter
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, TypeProto

from passes.base import walk
from passes.graph.from_onnx import info_of
from passes.graph.match import STANDARD
from passes.graph.to_onnx import tensors_of
from passes.weights.recipe import default_opset

_WITH_BODIES = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""ONNX's operators that have bodies. Those of other domains may have some."""


def bodies_of_proto(node: NodeProto) -> Sequence[GraphProto]:
    """The bodies of a node."""
    if node.op_type not in _WITH_BODIES and node.domain in STANDARD:
        return ()
    return [a.g for a in node.attribute if a.type == AttributeProto.GRAPH and not a.ref_attr_name]


def walk_protos(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and every body (of If, Loop, Scan) below it, in the order of `passes.base.walk`."""
    yield graph
    for node in graph.node:
        for body in bodies_of_proto(node):
            yield from walk_protos(body)


def nodes_of(part: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Every node of a graph or function and of the bodies in it."""
    for node in part.node:
        yield node
        for body in bodies_of_proto(node):
            yield from nodes_of(body)


def shell(model: ModelProto) -> ModelProto:
    """A copy for ONNX's checker and inference, with equal types everywhere.

    Initializers without data in memory are inputs of the model; those of bodies under a name of their own. What ONNX
    rejects and runtimes run is left out: outputs of unknown rank, and what GroupNormalization of opset 18 does.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in copy.graph.input}
    for number, body in enumerate(walk_protos(copy.graph)):
        absent = [t for t in body.initializer if t.data_location == TensorProto.EXTERNAL]
        if not absent:
            continue
        held = [t for t in body.initializer if t.data_location != TensorProto.EXTERNAL]
        names = {t.name: f"{t.name}@body {number}" if number else t.name for t in absent}
        copy.graph.input.extend(
            onnx.helper.make_tensor_value_info(names[t.name], t.data_type, t.dims)
            for t in absent
            if names[t.name] not in known
        )
        del body.initializer[:]
        body.initializer.extend(held)
        if number:
            _rename_reads(body, names)
    _replace_deprecated(copy)
    ranked = [v for v in copy.graph.output if not _lacks_rank(v.type)]
    del copy.graph.output[:]
    copy.graph.output.extend(ranked)
    return copy


def _lacks_rank(kind: TypeProto) -> bool:
    return kind.HasField("tensor_type") and not kind.tensor_type.HasField("shape")


def _rename_reads(body: GraphProto, names: Mapping[str, str]) -> None:
    """Let the nodes of a body, and of those below it, read other tensors."""
    for node in body.node:
        for index, name in enumerate(node.input):
            node.input[index] = names.get(name, name)
        for inner in bodies_of_proto(node):
            own = {tensor.name for tensor in inner.initializer}
            _rename_reads(inner, {old: new for old, new in names.items() if old not in own})


def _replace_deprecated(model: ModelProto) -> None:
    parts = [(model.graph, model.opset_import), *((f, f.opset_import) for f in model.functions)]
    for part in (part for part, imports in parts if default_opset(imports) in _OLD_NORM):
        for node in nodes_of(part):
            if node.op_type == "GroupNormalization" and node.domain in STANDARD:
                node.op_type = "Identity"
                del node.input[1:], node.attribute[:]


_OLD_NORM = (18, 19, 20)
"""The opsets whose GroupNormalization has a scale for each group. Opset 21 has one for each channel."""


def infer_types(model: ModelProto) -> ModelProto:
    """A copy with value_info (element type and shape) for all tensors that ONNX can infer, in bodies and functions.

    A function gets the types that all of its callers agree on.
    """
    inferred = onnx.shape_inference.infer_shapes(shell(model), data_prop=True)
    typed = ModelProto()
    typed.CopyFrom(model)
    _take_types(typed.graph, inferred.graph)
    if typed.functions:
        _type_functions(typed)
    return typed


def _take_types(graph: GraphProto, inferred: GraphProto) -> None:
    """Give a graph and its bodies what was inferred on its shell."""
    for body, found in zip(walk_protos(graph), walk_protos(inferred), strict=True):
        types = {value.name: value.type for value in (*found.value_info, *found.input, *found.output)}
        ends = body.output if body is graph else (*body.input, *body.output)
        for value in (value for value in ends if value.name in types):
            value.type.CopyFrom(types[value.name])
        del body.value_info[:]
        body.value_info.extend(found.value_info)


def fill_types(graph: gs.Graph, model: ModelProto) -> None:
    """Give the tensors of `graph` the types and dimensions that ONNX infers on `model`, its export."""
    for part, body in zip(walk(graph), walk_protos(infer_types(model).graph), strict=True):
        inferred = {value.name: info_of(value) for value in body.value_info}
        for name, tensor in tensors_of(part).items():
            if isinstance(tensor, gs.Variable) and name in inferred:
                _fill(tensor, *inferred[name])


def _fill(tensor: gs.Variable, dtype: Any, shape: Sequence[int | str | None] | None, _: str | None) -> None:
    """Add what is not known of a tensor yet; a number takes the place of a symbol."""
    tensor.dtype = dtype if tensor.dtype is None else tensor.dtype
    if tensor.shape is None:
        tensor.shape = None if shape is None else list(shape)
    if shape is not None and len(tensor.shape) == len(shape):
        pairs = zip(tensor.shape, shape, strict=True)
        tensor.shape = [new if isinstance(new, int) else old for old, new in pairs]


_UNKNOWN = "unknown"
Types = Mapping[str, TypeProto]
Key = tuple[str, str, str]
"""What a call names: domain, function and overload."""


def _type_functions(model: ModelProto) -> None:
    """Write into each function, and the bodies in it, the types that follow from its calls."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    calls: dict[Key, list[tuple[NodeProto, Types]]] = {key: [] for key in functions}
    _collect_calls(model.graph, {}, calls)
    for key in _callers_first(functions):
        function = functions[key]
        typed = _typed_body(function, calls[key], model)
        del function.value_info[:]
        function.value_info.extend((*typed.input, *typed.value_info, *typed.output))
        for node, found in zip(function.node, typed.node, strict=True):
            for body, other in zip(bodies_of_proto(node), bodies_of_proto(found), strict=True):
                _take_types(body, other)
        _collect_calls(typed, {}, calls)


def _key(node: NodeProto) -> Key:
    return node.domain, node.op_type, node.overload


def _callers_first(functions: Mapping[Key, FunctionProto]) -> Iterator[Key]:
    """The functions in an order in which each comes after all that call it."""
    order = TopologicalSorter[Key](dict.fromkeys(functions, ()))
    for caller, function in functions.items():
        for node in nodes_of(function):
            if _key(node) in functions:
                order.add(_key(node), caller)
    return iter(order.static_order())


def _collect_calls(graph: GraphProto, outer: Types, calls: dict[Key, list[tuple[NodeProto, Types]]]) -> None:
    """Add the calls in a graph and its bodies, each with the types of what it can read."""
    values = (*graph.input, *graph.value_info, *graph.output)
    held = (onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer)
    types = ChainMap({v.name: v.type for v in (*values, *held) if v.HasField("type")}, outer)  # type: ignore[arg-type]
    for node in graph.node:
        if _key(node) in calls:
            calls[_key(node)].append((node, types))
        for body in bodies_of_proto(node):
            _collect_calls(body, types, calls)


def _typed_body(
    function: FunctionProto, calls: Sequence[tuple[NodeProto, Types]], model: ModelProto
) -> GraphProto:
    """The function as a graph, with the types that ONNX infers from what all of its calls agree on."""
    imports = [*function.opset_import, onnx.helper.make_opsetid(_UNKNOWN, 1)]
    made = ModelProto(ir_version=model.ir_version, opset_import=imports, functions=model.functions)
    for index, name in enumerate(function.input):
        given = [types.get(node.input[index]) if index < len(node.input) else None for node, types in calls]
        made.graph.input.add(name=name, type=_common_type(given))
    made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in function.output)
    made.graph.node.extend(function.node)
    _set_attributes(made.graph, function, [node for node, _ in calls])
    _replace_deprecated(made)
    inferred: ModelProto = onnx.shape_inference.infer_shapes(made, data_prop=True)
    return inferred.graph


def _common_type(types: Sequence[TypeProto | None]) -> TypeProto | None:
    """What all types say: an element type, and the dimensions that are equal; None where they differ."""
    found, *others = types or [None]
    if found is None or any(other is None or not other.HasField("tensor_type") for other in others):
        return None
    common = TypeProto()
    common.CopyFrom(found)
    mine = common.tensor_type
    for tensor in (other.tensor_type for other in others if other is not None):
        if tensor.elem_type != mine.elem_type:
            return None
        if not tensor.HasField("shape") or len(tensor.shape.dim) != len(mine.shape.dim):
            mine.ClearField("shape")
            continue
        for dim, other_dim in zip(mine.shape.dim, tensor.shape.dim, strict=True):
            if dim != other_dim:
                dim.Clear()
    return common


def _set_attributes(graph: GraphProto, function: FunctionProto, calls: Sequence[NodeProto]) -> None:
    """Give the nodes of a function's body the attributes that all calls agree on.

    A node with an attribute on which they differ becomes an operator that ONNX does not know: nothing follows from it.
    """
    defaults = {attribute.name: attribute for attribute in function.attribute_proto}
    given = [defaults | {attribute.name: attribute for attribute in node.attribute} for node in calls]
    for node in nodes_of(graph):
        for attribute in [attribute for attribute in node.attribute if attribute.ref_attr_name]:
            name, values = attribute.name, [call.get(attribute.ref_attr_name) for call in given]
            node.attribute.remove(attribute)
            if not values or any(
                value is None or value != values[0] or value.ref_attr_name for value in values
            ):
                if any(value is not None for value in values):
                    node.domain = _UNKNOWN
                continue
            made = node.attribute.add()
            made.CopyFrom(values[0])
            made.name = name
