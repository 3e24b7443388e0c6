"""ONNX models to graphsurgeon's graphs and back: the same result as graphsurgeon's own, at a tenth of its cost.

A backbone has tens of thousands of nodes and few distinct types and attributes, so each distinct one is converted once.
Models with functions or sparse tensors are graphsurgeon's to convert.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.util.misc import SynchronizedList

from passes.base import walk
from passes.weights.recipe import RecipeValues, default_opset

_CACHED = 1 << 16
"""Distinct types and attributes that are remembered, of each kind."""


class TensorInfo(NamedTuple):
    """What a ValueInfoProto says: element type as graphsurgeon has it, dimensions, and graphsurgeon's kind of type."""

    dtype: Any
    shape: tuple[int | str | None, ...] | None
    kind: str | None


def info_of(value: ValueInfoProto) -> TensorInfo:
    """The type and dimensions in a ValueInfoProto."""
    return _info(value.type.SerializeToString())


@lru_cache(_CACHED)
def _info(content: bytes) -> TensorInfo:
    tensor = OnnxImporter.import_tensor(ValueInfoProto(name="x", type=TypeProto.FromString(content)))
    return TensorInfo(tensor.dtype, None if tensor.shape is None else tuple(tensor.shape), tensor.type)


def import_graph(model: ModelProto) -> gs.Graph:
    """graphsurgeon's import, with every recipe initializer recognised (subgraphs included)."""
    if model.functions or model.graph.sparse_initializer:
        return _recognised(gs.import_onnx(model))
    tensors = _import_tensors(model.graph)
    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [_tensor(tensors, value) for value in model.graph.input if value.name not in held]
    outputs = [_tensor(tensors, value) for value in model.graph.output]
    opset = default_opset(model.opset_import)
    nodes = [_import_node(node, tensors, opset, model.opset_import) for node in model.graph.node]
    graph = gs.Graph(
        nodes,
        inputs,
        outputs,
        name=model.graph.name,
        doc_string=model.graph.doc_string,
        opset=opset,
        import_domains=model.opset_import,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        ir_version=model.ir_version,
    )
    return _recognised(graph)


def _recognised(graph: gs.Graph) -> gs.Graph:
    """The graph with its recipes as such."""
    for part in walk(graph):
        for tensor in tensors_of(part).values():
            values: Any = getattr(tensor, "_values", None)
            if type(values) is LazyValues and any(e.key == "recipe" for e in values.tensor.external_data):
                tensor._values = RecipeValues(values.tensor)
    return graph


def _import_tensors(graph: GraphProto) -> OrderedDict[str, gs.Tensor]:
    """Initializers and tensors of known type, by name; what is said of one later adds to what was said before."""
    tensors: OrderedDict[str, gs.Tensor] = OrderedDict()
    for initializer in graph.initializer:
        if initializer.name not in tensors:
            tensors[initializer.name] = OnnxImporter.import_tensor(initializer)
    for value in graph.value_info:
        known = tensors.get(value.name)
        if known is None:
            _tensor(tensors, value)
        elif isinstance(known, gs.Variable):
            info = info_of(value)
            known.dtype = known.dtype or info.dtype
            known.shape = known.shape or (None if info.shape is None else list(info.shape))
    return tensors


def _tensor(tensors: dict[str, gs.Tensor], value: ValueInfoProto) -> gs.Tensor:
    """The tensor of that name, made of `value` where there is none yet."""
    if value.name not in tensors:
        info = info_of(value)
        shape = None if info.shape is None else list(info.shape)
        tensors[value.name] = _variable(value.name, info.dtype, shape, info.kind)
    return tensors[value.name]


def _variable(name: str, dtype: Any, shape: list[int | str | None] | None, kind: str | None) -> gs.Variable:
    """What `gs.Variable(name, dtype, shape, kind)` gives, without the checks of its setters."""
    made = object.__new__(gs.Variable)
    made.__dict__.update(
        name=name,
        inputs=_links(made, "outputs"),
        outputs=_links(made, "inputs"),
        dtype=dtype,
        shape=shape,
        type=kind,
    )
    return made


def _links(owner: gs.Node | gs.Tensor, field: str, items: Iterable[gs.Node | gs.Tensor] = ()) -> list[Any]:
    """graphsurgeon's list of what is on one side of a node or tensor, whose `field` has the owner in turn."""
    links: list[Any] = SynchronizedList.__new__(SynchronizedList)
    links.parent_obj, links.field_name = owner, field  # type: ignore[attr-defined]
    for item in items:
        list.append(links, item)
        list.append(getattr(item, field), owner)
    return links


def _import_node(
    node: NodeProto, tensors: OrderedDict[str, gs.Tensor], opset: int | None, domains: Any
) -> gs.Node:
    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type in _PLAIN:
            name, value = _plain(attribute.SerializeToString())
            attributes[name] = list(value) if isinstance(value, tuple) else value
        else:
            attributes |= OnnxImporter.import_attributes([attribute], OrderedDict(), tensors, opset, domains)
    inputs, outputs = (
        [tensors.get(name) or _unknown(name, tensors) for name in names]
        for names in (node.input, node.output)
    )
    made = object.__new__(gs.Node)  # as gs.Node(...) would, without the checks of its setters
    made.__dict__.update(
        op=node.op_type,
        name=node.name,
        attrs=attributes,
        inputs=_links(made, "outputs", inputs),
        outputs=_links(made, "inputs", outputs),
        domain=node.domain if node.HasField("domain") else None,
    )
    return made


def _unknown(name: str, tensors: dict[str, gs.Tensor]) -> gs.Tensor:
    """A tensor that nothing is known of; one without a name stands for an omitted input or output."""
    made = _variable(name, None, None, "tensor_type")
    if name:
        tensors[name] = made
    return made


_PLAIN = frozenset(
    {AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.INTS}
    | {AttributeProto.FLOATS, AttributeProto.STRINGS}
)


@lru_cache(_CACHED)
def _plain(content: bytes) -> tuple[str, Any]:
    """Name and value of an attribute that is no tensor and no graph; a list as a tuple."""
    attributes = OnnxImporter.import_attributes(
        [AttributeProto.FromString(content)], OrderedDict(), OrderedDict(), 0, None
    )
    ((name, value),) = attributes.items()
    return name, tuple(value) if isinstance(value, list) else value


def export_graph(graph: gs.Graph, like: ModelProto) -> ModelProto:
    """graphsurgeon's export with IR version, metadata and producer of `like`, which graphsurgeon drops.

    When the graph is of another opset than `like`, the IR version is the one that came with that opset.
    """
    model = export_model(graph)
    opset = default_opset(model.opset_import)
    model.ir_version = like.ir_version
    if opset is not None and opset != default_opset(like.opset_import):
        model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.metadata_props.extend(like.metadata_props)
    return model


def export_model(graph: gs.Graph) -> ModelProto:
    """What `gs.export_onnx(graph, do_type_check=False)` gives."""
    if graph.functions:
        return gs.export_onnx(graph, do_type_check=False)  # type: ignore[no-any-return]
    domains = {node.domain for part in walk(graph) for node in part.nodes} - {None}
    frame = gs.Graph(
        [gs.Node("", domain=domain) for domain in sorted(domains)],
        graph.inputs,
        graph.outputs,
        name=graph.name,
        doc_string=graph.doc_string,
        opset=graph.opset,
        import_domains=graph.import_domains,
        producer_name=graph.producer_name,
        producer_version=graph.producer_version,
        ir_version=graph.ir_version,
    )
    model: ModelProto = gs.export_onnx(frame, do_type_check=False)
    graph.import_domains = frame.import_domains
    out = model.graph
    del out.node[:], out.initializer[:], out.value_info[:], out.sparse_initializer[:]
    out.node.extend(_export_node(node) for node in graph.nodes)
    _export_tensors(graph, out)
    return model


def _export_tensors(graph: gs.Graph, out: GraphProto) -> None:
    """Initializers, and the types that are known, in the order in which nodes have the tensors."""
    tensors = tensors_of(graph)
    for tensor in tensors.values():
        if isinstance(tensor, gs.Constant):
            if isinstance(tensor._values, SparseValues):
                out.sparse_initializer.append(OnnxExporter.export_sparse_tensor_proto(tensor))
            else:
                out.initializer.append(OnnxExporter.export_tensor_proto(tensor))
    ends = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    for name, tensor in tensors.items():
        if not isinstance(tensor, gs.Variable) or name in ends:
            continue
        if tensor.dtype is not None:
            shape = None if tensor.shape is None else tuple(tensor.shape)
            out.value_info.add(name=name, type=_type(tensor.type, tensor.dtype, shape))
        elif tensor.shape is not None:
            out.value_info.add(name=name)


def tensors_of(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """What `graph.tensors()` gives: every tensor by name, in the order of the nodes."""
    tensors = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            tensors[tensor.name] = tensor
        for tensor in node.outputs:
            tensors[tensor.name] = tensor
    tensors |= {tensor.name: tensor for tensor in graph.outputs}
    tensors.pop("", None)
    return tensors


@lru_cache(_CACHED)
def _type(kind: str, dtype: Any, shape: tuple[int | str | None, ...] | None) -> TypeProto:
    variable = gs.Variable("x", dtype, None if shape is None else list(shape), kind)
    proto: TypeProto = OnnxExporter.export_value_info_proto(variable, False).type
    return proto


def _export_node(node: gs.Node) -> NodeProto:
    return NodeProto(
        op_type=node.op,
        name=node.name or None,  # None: not set, which is not the same as empty
        domain=node.domain,
        input=[tensor.name for tensor in node.inputs],
        output=[tensor.name for tensor in node.outputs],
        attribute=_export_attributes(node.attrs) if node.attrs else None,
    )


def _export_attributes(attributes: Mapping[str, Any]) -> Iterable[AttributeProto]:
    for name, value in attributes.items():
        if type(value) in (int, str):
            yield _attribute(name, value)
        elif type(value) is list and value and all(type(item) is int for item in value):
            yield _attribute(name, tuple(value))
        else:
            yield from OnnxExporter.export_attributes({name: value})


@lru_cache(_CACHED)
def _attribute(name: str, value: int | str | tuple[int, ...]) -> AttributeProto:
    return onnx.helper.make_attribute(name, value)
