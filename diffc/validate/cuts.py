"""Where a graph can be cut: at the last value of every module, since nodes are named after modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

import onnx
from onnx import TensorProto, helper

COMPUTED = "/computed"
"""Suffix of a value that an extracted graph computes. Its consumers are fed the reference's value instead."""

OUTPUT = "output "
"""What a graph output that no module ends with has in front of its name, in the place of a module."""


@dataclass(frozen=True)
class ModuleValue:
    """The last value that the nodes of a module compute: its `tensor`, and the node and operator that compute it.

    An output of the graph that no module ends with is one as well; its `module` is OUTPUT and the output's name.
    """

    module: str
    node: str
    op: str
    tensor: str


def module_values(model: onnx.ModelProto) -> list[ModuleValue]:
    """One value for each module that nodes are named after (`<module>/<op>`), in the order of the nodes; then outputs.

    A node that a fusion merged with the last node of another module may compute that module's value too; the tensor's
    name, `<module>/<op>_out`, still says whose it is. Only float32 values count; a tensor without a noted type is taken
    for one. A module whose last node belongs to a module inside it has no value of its own.
    """
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    weights = {t.name for t in model.graph.initializer}
    last: dict[str, tuple[int, ModuleValue]] = {}
    ends: dict[str, int] = {}
    for index, node in enumerate(model.graph.node):
        if all(name in weights for name in node.input if name):
            continue
        for module, tensor in _owned_outputs(node):
            if types.get(tensor, TensorProto.FLOAT) == TensorProto.FLOAT:
                last[module] = index, ModuleValue(module, node.name, node.op_type, tensor)
                for name in (module, node.name.partition("/")[0]):
                    ends |= dict.fromkeys(accumulate(name.split("."), "{}.{}".format), index)
    own = sorted(((i, value) for i, value in last.values() if ends[value.module] == i), key=itemgetter(0))
    values = [value for _, value in own]
    outputs = {v.name for v in model.graph.output} - {v.tensor for v in values}
    for node in model.graph.node:
        values += [ModuleValue(OUTPUT + n, node.name, node.op_type, n) for n in node.output if n in outputs]
    return values


def _owned_outputs(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """(module, tensor): the node's own module with its first output, and other modules that outputs are named after."""
    own, slash, _ = node.name.partition("/")
    for position, tensor in enumerate(node.output):
        owner, named, rest = tensor.partition("/")
        if named and owner and owner != own and "/" not in rest:
            yield owner, tensor
        elif position == 0 and slash and own:
            yield own, tensor


def extract(
    model: onnx.ModelProto,
    wanted: Sequence[str],
    fed: Mapping[str, int],
    shapes_of: Set[str] = frozenset(),
) -> onnx.ModelProto:
    """The part of `model` that computes the tensors `wanted` from the `fed` ones (name -> rank, float32).

    Fed tensors become inputs. Each wanted tensor becomes an output with COMPUTED after its name, and so does the shape
    of each tensor in `shapes_of`. The graph's own inputs stay where the part reads them.
    """
    nodes, inputs = _needed(model, [*wanted, *shapes_of], set(fed))
    part = onnx.ModelProto()
    part.CopyFrom(_without_graph(model))
    graph = part.graph
    for node in nodes:
        copy = graph.node.add()
        copy.CopyFrom(node)
        for i, name in enumerate(node.output):
            if name in fed and name in wanted:
                copy.output[i] = name + COMPUTED
    rest = (name for name in wanted if name not in fed)
    graph.node.extend(helper.make_node("Identity", [name], [name + COMPUTED]) for name in rest)
    graph.node.extend(helper.make_node("Shape", [name], [name + COMPUTED]) for name in sorted(shapes_of))
    used = {name for node in graph.node for name in tensors_read(node)}
    graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    graph.input.extend(v for v in model.graph.input if v.name in inputs)
    graph.input.extend(_value(name, fed[name]) for name in fed if name in inputs)
    floats = (helper.make_tensor_value_info(n + COMPUTED, TensorProto.FLOAT, None) for n in wanted)
    graph.output.extend(floats)
    ranks = (
        helper.make_tensor_value_info(n + COMPUTED, TensorProto.INT64, ["rank"]) for n in sorted(shapes_of)
    )
    graph.output.extend(ranks)
    made = {name for node in graph.node for name in node.output}
    graph.value_info.extend(v for v in model.graph.value_info if v.name in made)
    return part


def nodes_computing(model: onnx.ModelProto, tensor: str, fed: Set[str]) -> list[str]:
    """Names of the nodes that compute `tensor` from the `fed` ones, in order."""
    return [node.name for node in _needed(model, [tensor], fed - {tensor})[0]]


def _needed(
    model: onnx.ModelProto, wanted: Iterable[str], fed: Set[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that compute `wanted` from the `fed` tensors, in order, and the tensors that they need as inputs."""
    makers = {name: i for i, node in enumerate(model.graph.node) for name in node.output if name}
    todo = [makers[name] for name in wanted if name in makers]
    found, inputs = set(todo), {name for name in wanted if name not in makers}
    while todo:
        for name in tensors_read(model.graph.node[todo.pop()]):
            if name in fed or name not in makers:
                inputs.add(name)
            elif makers[name] not in found:
                found.add(makers[name])
                todo.append(makers[name])
    return [model.graph.node[i] for i in sorted(found)], inputs


def tensors_read(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, with those that the graphs inside it capture."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            own |= {name for inner in graph.node for name in inner.output}
            read = [name for inner in graph.node for name in tensors_read(inner)]
            names += [name for name in (*read, *(v.name for v in graph.output)) if name not in own]
    return names


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    shell = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    shell.functions.extend(model.functions)
    shell.graph.name = model.graph.name
    return shell


def _value(name: str, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)])
