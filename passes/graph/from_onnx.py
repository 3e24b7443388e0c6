"""ONNX models to graphsurgeon's graphs: the same result as graphsurgeon's own import, at a tenth of its cost.

A backbone has tens of thousands of nodes and few distinct types and attributes, so each distinct one is converted
once. Beyond graphsurgeon's import this one keeps what a runtime needs: the overload that a call names, types inside
functions, and attributes of every kind.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import onnx_graphsurgeon as gs
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.util.misc import SynchronizedList

from passes.base import walk
from passes.weights.recipe import RECIPE, RecipeValues, default_opset

CACHED = 1 << 16
"""Distinct types and attributes that are remembered, of each kind."""
Tensors = OrderedDict[str, gs.Tensor]


class TensorInfo(NamedTuple):
    """What a ValueInfoProto says: element type as graphsurgeon has it, dimensions, and graphsurgeon's kind of type."""

    dtype: Any
    shape: tuple[int | str | None, ...] | None
    kind: str | None


def info_of(value: ValueInfoProto) -> TensorInfo:
    """The type and dimensions in a ValueInfoProto."""
    return _info(value.type.SerializeToString())


@lru_cache(CACHED)
def _info(content: bytes) -> TensorInfo:
    tensor = OnnxImporter.import_tensor(ValueInfoProto(name="x", type=TypeProto.FromString(content)))
    return TensorInfo(tensor.dtype, None if tensor.shape is None else tuple(tensor.shape), tensor.type)


def import_graph(model: ModelProto) -> gs.Graph:
    """The model as graphsurgeon's graph: bodies of If, Loop and Scan in it, functions beside it, recipes recognised."""
    reader = _Reader(default_opset(model.opset_import), list(model.opset_import))
    graph = reader.graph(model.graph, {})
    graph.functions = [_import_function(function, reader) for function in model.functions]
    graph.producer_name, graph.producer_version = model.producer_name, model.producer_version
    graph.ir_version = model.ir_version
    return graph


def name_nodes(graph: gs.Graph) -> None:
    """Give every node a name of its own in its graph or body; names that are there and single stay."""
    for part in walk(graph):
        taken: set[str] = set()
        for node in part.nodes:
            wish = node.name or (f"{node.op}_{node.outputs[0].name}" if node.outputs else node.op)
            name, number = wish, 1
            while name in taken:
                number += 1
                name = f"{wish}_{number}"
            taken.add(name)
            node.name = name


def _import_function(function: FunctionProto, model: _Reader) -> gs.Function:
    """A function; its tensors get the types that `passes.graph.inference` wrote into it."""
    opset = default_opset(function.opset_import) or model.opset
    reader = _Reader(opset, list(function.opset_import) or model.domains)
    tensors = Tensors()
    for value in function.value_info:
        _tensor(tensors, value)
    inputs, outputs = (
        [tensors.get(name) or _unknown(name, tensors) for name in names]
        for names in (function.input, function.output)
    )
    attributes: dict[str, Any] = dict.fromkeys(function.attribute)
    for attribute in function.attribute_proto:
        attributes |= reader.attribute(attribute, tensors, {})
    made = gs.Function(
        function.name,
        function.domain,
        [reader.node(node, tensors, {}) for node in function.node],
        inputs,
        outputs,
        doc_string=function.doc_string,
        opset=opset,
        import_domains=reader.domains,
        attrs=attributes,
    )
    made.overload, made.metadata_props = function.overload, list(function.metadata_props)
    return made


class _Reader(NamedTuple):
    """Converts graphs and nodes; the opset and the imported domains are those of the model or function around them."""

    opset: int | None
    domains: Any

    def graph(self, graph: GraphProto, outer: Mapping[str, gs.Tensor]) -> gs.Graph:
        """A graph or a body; `outer` are the tensors around a body, which its nodes may read."""
        tensors = _import_tensors(graph, outer)
        held = {tensor.name for tensor in graph.initializer}
        inputs = [_tensor(tensors, value) for value in graph.input if value.name not in held]
        outputs = [_tensor(tensors, value) for value in graph.output]
        return gs.Graph(
            [self.node(node, tensors, outer) for node in graph.node],
            inputs,
            outputs,
            name=graph.name,
            doc_string=graph.doc_string,
            opset=self.opset,
            import_domains=self.domains,
        )

    def node(self, node: NodeProto, tensors: Tensors, outer: Mapping[str, gs.Tensor]) -> gs.Node:
        attributes: dict[str, Any] = {}
        for attribute in node.attribute:
            attributes |= self.attribute(attribute, tensors, outer)
        inputs = [tensors.get(name) or outer.get(name) or _unknown(name, tensors) for name in node.input]
        outputs = [tensors.get(name) or _unknown(name, tensors) for name in node.output]
        made = object.__new__(gs.Node)  # as gs.Node(...) would, without the checks of its setters
        made.__dict__.update(
            op=node.op_type,
            name=node.name,
            attrs=attributes,
            inputs=_links(made, "outputs", inputs),
            outputs=_links(made, "inputs", outputs),
            domain=node.domain if node.HasField("domain") else None,
        )
        if node.overload:
            made.overload = node.overload
        return made

    def attribute(
        self, attribute: AttributeProto, tensors: Tensors, outer: Mapping[str, gs.Tensor]
    ) -> dict[str, Any]:
        """Name and value of an attribute; of a kind that graphsurgeon does not know, the protobuf itself."""
        if attribute.type == AttributeProto.GRAPH and not attribute.ref_attr_name:
            return {attribute.name: self.graph(attribute.g, ChainMap(tensors, outer))}  # type: ignore[arg-type]
        if attribute.type == AttributeProto.TENSOR:
            return OnnxImporter.import_attributes([attribute], {}, {}, self.opset, self.domains)  # type: ignore[no-any-return]
        if attribute.type not in _PLAIN:
            return {attribute.name: attribute}
        name, value = _plain(attribute.SerializeToString())
        return {name: list(value) if isinstance(value, tuple) else value}


def _import_tensors(graph: GraphProto, outer: Mapping[str, gs.Tensor]) -> Tensors:
    """Initializers and tensors of known type, by name; what is said of one later adds to what was said before."""
    tensors = Tensors()
    for initializer in graph.initializer:
        if initializer.name not in tensors:
            tensors[initializer.name] = made = OnnxImporter.import_tensor(initializer)
            if any(entry.key == RECIPE for entry in initializer.external_data):
                made._values = RecipeValues(initializer)
    for sparse in graph.sparse_initializer:
        tensors[sparse.values.name] = OnnxImporter.import_tensor(sparse)
    # A body lists types of the tensors around it too, under names that it may not claim.
    own = {name for node in graph.node for name in node.output} if outer else set()
    for value in graph.value_info:
        known = tensors.get(value.name)
        if known is None:
            if value.name in own or value.name not in outer:
                _tensor(tensors, value)
        elif isinstance(known, gs.Variable):
            info = info_of(value)
            known.dtype = known.dtype or info.dtype
            known.shape = known.shape or (None if info.shape is None else list(info.shape))
    return tensors


def _tensor(tensors: Tensors, value: ValueInfoProto) -> gs.Tensor:
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
        type=kind or "tensor_type",  # an output of a body may have no type: inference finds one
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


def _unknown(name: str, tensors: Tensors) -> gs.Tensor:
    """A tensor that nothing is known of; one without a name stands for an omitted input or output."""
    made = _variable(name, None, None, "tensor_type")
    if name:
        tensors[name] = made
    return made


_PLAIN = frozenset(
    {AttributeProto.INT, AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.INTS}
    | {AttributeProto.FLOATS, AttributeProto.STRINGS}
)


@lru_cache(CACHED)
def _plain(content: bytes) -> tuple[str, Any]:
    """Name and value of an attribute that is neither a tensor nor a graph; a list as a tuple."""
    attributes = OnnxImporter.import_attributes(
        [AttributeProto.FromString(content)], OrderedDict(), OrderedDict(), 0, None
    )
    ((name, value),) = attributes.items()
    return name, tuple(value) if isinstance(value, list) else value
