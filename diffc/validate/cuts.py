"""Where a graph can be cut: at the last value of every module, which nodes are named after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter

import onnx
from onnx import TensorProto, helper

HERE = "/here"
"""Suffix of a value that a cut graph computes, where its consumers are fed what it should be."""

OUTPUT = "output "
"""What stands before the name of a graph output, in the place of a module."""


@dataclass(frozen=True)
class Point:
    """The last value that the nodes of a module make: its `tensor`, and the node and operator behind it.

    An output of the graph that no module ends with is a point as well; `module` is then OUTPUT and its name.
    """

    module: str
    node: str
    op: str
    tensor: str


def points_of(model: onnx.ModelProto) -> list[Point]:
    """One point for each module that nodes are named after (`<module>/<op>`), in the order of the nodes.

    A node that took in the last one of another module may give that one's value, too; its name, `<module>/<op>_out`,
    still says whose it is. Behind the modules come the graph's outputs. Of float32 values only; without a noted type
    they are taken for that. A module that ends with a module inside it has no point: its own last value is not what
    it gives.
    """
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    weights = {t.name for t in model.graph.initializer}
    last: dict[str, tuple[int, Point]] = {}
    ends: dict[str, int] = {}
    for index, node in enumerate(model.graph.node):
        if all(name in weights for name in node.input if name):
            continue
        for module, tensor in _given(node):
            if types.get(tensor, TensorProto.FLOAT) == TensorProto.FLOAT:
                last[module] = index, Point(module, node.name, node.op_type, tensor)
                for name in (module, node.name.partition("/")[0]):
                    ends |= dict.fromkeys(accumulate(name.split("."), "{}.{}".format), index)
    own = sorted(((i, point) for i, point in last.values() if ends[point.module] == i), key=itemgetter(0))
    points = [point for _, point in own]
    outputs = {v.name for v in model.graph.output} - {p.tensor for p in points}
    for node in model.graph.node:
        points += [Point(OUTPUT + n, node.name, node.op_type, n) for n in node.output if n in outputs]
    return points


def _given(node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """Modules and tensors: the node's own and its first output; others, and outputs that are called after them."""
    own, slash, _ = node.name.partition("/")
    for position, tensor in enumerate(node.output):
        owner, named, rest = tensor.partition("/")
        if named and owner and owner != own and "/" not in rest:
            yield owner, tensor
        elif position == 0 and slash and own:
            yield own, tensor


def cut(
    model: onnx.ModelProto, wanted: Sequence[str], known: Mapping[str, int], values: Set[str] = frozenset()
) -> onnx.ModelProto:
    """The part of `model` that computes the tensors `wanted` from the `known` ones (name -> rank, float32).

    Known tensors become inputs, wanted ones outputs with HERE behind their names; the graph's own inputs stay where
    they are needed. Of `values`, wanted too, the outputs are the shapes.
    """
    nodes, inputs = _needed(model, [*wanted, *values], set(known))
    part = onnx.ModelProto()
    part.CopyFrom(_without_graph(model))
    graph = part.graph
    for node in nodes:
        copy = graph.node.add()
        copy.CopyFrom(node)
        for i, name in enumerate(node.output):
            if name in known and name in wanted:
                copy.output[i] = name + HERE
    graph.node.extend(
        helper.make_node("Identity", [name], [name + HERE]) for name in wanted if name not in known
    )
    graph.node.extend(helper.make_node("Shape", [name], [name + HERE]) for name in sorted(values))
    used = {name for node in graph.node for name in reads(node)}
    graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    graph.input.extend(v for v in model.graph.input if v.name in inputs)
    graph.input.extend(_value(name, known[name]) for name in known if name in inputs)
    graph.output.extend(helper.make_tensor_value_info(n + HERE, TensorProto.FLOAT, None) for n in wanted)
    graph.output.extend(
        helper.make_tensor_value_info(n + HERE, TensorProto.INT64, ["rank"]) for n in sorted(values)
    )
    made = {name for node in graph.node for name in node.output}
    graph.value_info.extend(v for v in model.graph.value_info if v.name in made)
    return part


def nodes_behind(model: onnx.ModelProto, tensor: str, known: Set[str]) -> list[str]:
    """Names of the nodes that make `tensor` out of the `known` ones, in order."""
    return [node.name for node in _needed(model, [tensor], known - {tensor})[0]]


def _needed(
    model: onnx.ModelProto, wanted: Iterable[str], known: Set[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes behind `wanted` as far as the `known` tensors, in order, and what must be fed."""
    makers = {name: i for i, node in enumerate(model.graph.node) for name in node.output if name}
    todo = [makers[name] for name in wanted if name in makers]
    found, fed = set(todo), {name for name in wanted if name not in makers}
    while todo:
        for name in reads(model.graph.node[todo.pop()]):
            if name in known or name not in makers:
                fed.add(name)
            elif makers[name] not in found:
                found.add(makers[name])
                todo.append(makers[name])
    return [model.graph.node[i] for i in sorted(found)], fed


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node takes, those that graphs inside it take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            own |= {name for inner in graph.node for name in inner.output}
            read = [name for inner in graph.node for name in reads(inner)]
            names += [name for name in (*read, *(v.name for v in graph.output)) if name not in own]
    return names


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    shell = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    shell.functions.extend(model.functions)
    shell.graph.name = model.graph.name
    return shell


def _value(name: str, rank: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(rank)])
