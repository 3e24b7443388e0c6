"""graphsurgeon's graphs to ONNX models: the same result as graphsurgeon's own export, at a tenth of its cost.

Where a body reads a weight of the graph around it, the weight is stored once, in the innermost graph that holds all of
its readers. graphsurgeon stores it in the body as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    TypeProto,
)
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import SparseValues

from passes.base import bodies_of, walk
from passes.graph.from_onnx import CACHED
from passes.graph.match import STANDARD
from passes.weights.recipe import default_opset


def export_graph(graph: gs.Graph, like: ModelProto) -> ModelProto:
    """`export_model` with IR version, metadata and producer of `like`, which graphsurgeon drops.

    When the graph is of another opset than `like`, the IR version is the one that came with that opset.
    """
    model = export_model(graph)
    opset = default_opset(model.opset_import)
    model.ir_version = max(like.ir_version, 4)  # below it an initializer has to be an input as well
    if opset is not None and opset != default_opset(like.opset_import):
        model.ir_version = onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", opset]
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.metadata_props.extend(like.metadata_props)
    return model


def export_model(graph: gs.Graph) -> ModelProto:
    """The graph as a model, with its functions."""
    functions = [_export_function(function) for function in graph.functions]
    model: ModelProto = onnx.helper.make_model(
        GraphProto(), opset_imports=_imports(graph), functions=functions
    )
    model.producer_name, model.producer_version = graph.producer_name, graph.producer_version
    if graph.ir_version is not None:
        model.ir_version = graph.ir_version
    _Writer(graph).write(graph, model.graph)
    return model


def _export_function(function: gs.Function) -> FunctionProto:
    """A function. It has no initializers: its constants are Constant nodes, before all others."""
    writer = _Writer(function)
    constants = [
        onnx.helper.make_node("Constant", [], [tensor.name], value=OnnxExporter.export_tensor_proto(tensor))
        for tensor in writer.stored(function)
    ]
    defaults = {name: value for name, value in function.attrs.items() if value is not None}
    made: FunctionProto = onnx.helper.make_function(
        function.domain or "",
        function.name,
        [tensor.name for tensor in function.inputs],
        [tensor.name for tensor in function.outputs],
        [*constants, *map(writer.node, function.nodes)],
        _imports(function),
        attributes=[name for name in function.attrs if name not in defaults],
        attribute_protos=OnnxExporter.export_attributes(defaults),
        doc_string=function.doc_string,
        overload=function.__dict__.get("overload") or None,
    )
    made.metadata_props.extend(function.__dict__.get("metadata_props", ()))
    return made


def _imports(part: gs.Graph) -> list[OperatorSetIdProto]:
    """The opset imports of a graph or function, with those that its nodes ask for: version 1."""
    imports = list(part.import_domains or [onnx.helper.make_opsetid("", part.opset)])
    known = {item.domain for item in imports} | set(STANDARD)
    used = {node.domain for body in walk(part) for node in body.nodes} - known
    return [*imports, *(onnx.helper.make_opsetid(domain, 1) for domain in sorted(used))]


class _Writer:
    """Writes a graph or function and its bodies, each with the constants that it stores."""

    def __init__(self, root: gs.Graph):
        self._root = root
        self._paths: dict[int, tuple[gs.Constant, tuple[gs.Graph, ...]]] = {}
        self._find_paths(root, ())

    def _find_paths(self, graph: gs.Graph, above: tuple[gs.Graph, ...]) -> None:
        """For each constant, the graphs around all of its readers, outermost first."""
        path = (*above, graph)
        for tensor in tensors_of(graph).values():
            if isinstance(tensor, gs.Constant):
                _, known = self._paths.get(id(tensor), (tensor, path))
                shared = tuple(a for a, b in zip(known, path, strict=False) if a is b)
                self._paths[id(tensor)] = tensor, shared
        for body in bodies_of(graph):
            self._find_paths(body, path)

    def stored(self, graph: gs.Graph) -> list[gs.Constant]:
        """The constants that a graph or body stores, in the order in which nodes read them."""
        return [tensor for tensor, path in self._paths.values() if path[-1] is graph]

    def write(self, graph: gs.Graph, out: GraphProto) -> None:
        """Write a graph or body into the empty `out`."""
        out.name = graph.name
        if graph.doc_string:
            out.doc_string = graph.doc_string
        out.input.extend(OnnxExporter.export_value_info_proto(tensor, False) for tensor in graph.inputs)
        out.output.extend(OnnxExporter.export_value_info_proto(tensor, False) for tensor in graph.outputs)
        out.node.extend(map(self.node, graph.nodes))
        for tensor in self.stored(graph):
            if isinstance(tensor._values, SparseValues):
                out.sparse_initializer.append(OnnxExporter.export_sparse_tensor_proto(tensor))
            else:
                out.initializer.append(OnnxExporter.export_tensor_proto(tensor))
        made = {id(tensor) for node in graph.nodes for tensor in node.outputs}
        ends = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
        for name, tensor in tensors_of(graph).items():
            # A body also reads tensors of the graph around it, which lists their types itself.
            if (
                isinstance(tensor, gs.Variable)
                and name not in ends
                and (graph is self._root or id(tensor) in made)
            ):
                _write_type(tensor, out)

    def node(self, node: gs.Node) -> NodeProto:
        return NodeProto(
            op_type=node.op,
            name=node.name or None,  # None: not set, which is not the same as empty
            domain=node.domain,
            overload=node.__dict__.get("overload"),
            input=[tensor.name for tensor in node.inputs],
            output=[tensor.name for tensor in node.outputs],
            attribute=self._attributes(node.attrs) if node.attrs else None,
        )

    def _attributes(self, attributes: Mapping[str, Any]) -> Iterable[AttributeProto]:
        for name, value in attributes.items():
            if type(value) in (int, str):
                yield _attribute(name, value)
            elif type(value) is list and value and all(type(item) is int for item in value):
                yield _attribute(name, tuple(value))
            elif type(value) is list and not value:  # of which type is not told: whole numbers, as axes are
                yield AttributeProto(name=name, type=AttributeProto.INTS)
            elif isinstance(value, AttributeProto):
                yield value
            elif isinstance(value, gs.Graph):
                made = AttributeProto(name=name, type=AttributeProto.GRAPH)
                self.write(value, made.g)
                yield made
            else:
                yield from OnnxExporter.export_attributes({name: value})


def _write_type(tensor: gs.Variable, out: GraphProto) -> None:
    """List what is known of a tensor between nodes."""
    if tensor.dtype is not None:
        shape = None if tensor.shape is None else tuple(tensor.shape)
        out.value_info.add(name=tensor.name, type=_type(tensor.type, tensor.dtype, shape))
    elif tensor.shape is not None:
        out.value_info.add(name=tensor.name)


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


@lru_cache(CACHED)
def _type(kind: str, dtype: Any, shape: tuple[int | str | None, ...] | None) -> TypeProto:
    variable = gs.Variable("x", dtype, None if shape is None else list(shape), kind)
    proto: TypeProto = OnnxExporter.export_value_info_proto(variable, False).type
    return proto


@lru_cache(CACHED)
def _attribute(name: str, value: int | str | tuple[int, ...]) -> AttributeProto:
    return onnx.helper.make_attribute(name, value)
