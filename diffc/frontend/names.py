"""Names for readers of a graph: nodes by module path, inputs and outputs as diffusers and optimum call them."""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir

from diffc.models.family import Family
from diffc.models.spec import Config

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter keeps the module paths of a node, outermost first."""


def name_graph(model: ir.Model, family: Family, config: Config) -> None:
    """Name nodes `<module path>/<op>`, their outputs after them, and the graph's inputs, outputs and dims.

    The exporter keeps module paths in the metadata of nodes, which graphsurgeon drops; so they move into the names.
    """
    graph = model.graph
    name_nodes(graph)
    dims = _name_inputs(graph, family, config)
    _name_outputs(graph, family, config)
    _name_dims(graph, dims)
    graph.name = family.name


def name_nodes(graph: ir.Graph) -> None:
    """Name nodes `<module path>/<op>` and their outputs after them; drop the exporter's metadata."""
    count: Counter[str] = Counter()
    for node in graph.all_nodes():
        node.name = _unique(f"{module_of(node)}/{node.op_type}".lstrip("/"), count)
        for i, value in enumerate(node.outputs):
            value.name = f"{node.name}_out" + (str(i) if i else "")
    _drop_metadata(graph)


def module_of(node: ir.Node) -> str:
    """The path of the module whose forward() made the node; empty for the backbone itself."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
    # The last scope is the operation itself. Scopes that torch added (`_empty_nn_...`) are not modules.
    modules = [s for s in scopes[:-1] if s and not s.startswith("_")]
    return modules[-1] if modules else ""


def _unique(name: str, count: Counter[str]) -> str:
    count[name] += 1
    return name if count[name] == 1 else f"{name}_{count[name] - 1}"


def _drop_metadata(graph: ir.Graph) -> None:
    """Drop the exporter's stack traces and signatures, which take more bytes than the graph."""
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _name_inputs(graph: ir.Graph, family: Family, config: Config) -> dict[str, str]:
    """Rename the inputs. Returns the family's name of each dimension by the exporter's expression for it."""
    items = family.inputs(config)
    if len(graph.inputs) != len(items):
        found = [value.name for value in graph.inputs]
        raise RuntimeError(f"{family}: the trace has inputs {found}, the family {[i.name for i in items]}")
    dims: dict[str, str] = {}
    nested = {} if family.interface else {"_".join(map(str, i.path)): i for i in items if i.path}
    by_path = {i.name: i for i in items} | nested
    for value in graph.inputs:
        item = by_path[str(value.name)]
        value.name = item.name
        for dim, name in zip(value.shape or (), item.dims, strict=True):
            if isinstance(name, str):
                dims[str(dim)] = name
        value.shape = ir.Shape(item.dims)
    return dims


def _name_outputs(graph: ir.Graph, family: Family, config: Config) -> None:
    for output, item in zip(graph.outputs, family.outputs(config), strict=True):
        output.name = item.name
        output.shape = ir.Shape(item.dims)


def _name_dims(graph: ir.Graph, dims: dict[str, str]) -> None:
    """Name known dimensions in intermediate shapes; dimensions that are expressions become unknown."""
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is None or value.is_graph_output():
                continue
            known = [d if isinstance(d, int) else dims.get(str(d)) for d in value.shape]
            value.shape = ir.Shape(known)
