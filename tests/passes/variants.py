"""Forms in which exporters write one and the same graph: bodies, functions, weights inside or around them, no names.

Every form computes what the graph computes, from the same inputs and a few of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper

Values = dict[str, Any]
Variant = Callable[[ModelProto], tuple[ModelProto, Values]]
"""A graph -> the same in another form, and the values of the inputs that were added."""


def _copy(made: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(made)
    return copy


def _body(made: ModelProto, name: str, *, weights: bool, inputs: Any = ()) -> GraphProto:
    """The nodes of the graph as a body: with its weights inside, or reading those around it.

    Its outputs get other names, since those of the graph are the names of what the body's node makes.
    """
    graph = _copy(made).graph
    inside = {output.name: f"{output.name}_inside" for output in graph.output}
    for node in graph.node:
        for names in (node.input, node.output):
            for index, tensor in enumerate(names):
                names[index] = inside.get(tensor, tensor)
    for output in graph.output:
        output.name = inside[output.name]
    weighed = graph.initializer if weights else ()
    return GraphProto(name=name, input=inputs, node=graph.node, output=graph.output, initializer=weighed)


def _around(made: ModelProto, node: NodeProto, *, weights: bool) -> ModelProto:
    """The model whose only node is `node`, which has the graph inside."""
    outer = _copy(made)
    del outer.graph.node[:], outer.graph.value_info[:]
    outer.graph.node.append(node)
    if weights:
        del outer.graph.initializer[:]
    return outer


def _in_if(made: ModelProto, *, weights: bool) -> tuple[ModelProto, Values]:
    """The graph in both branches, under the same names."""
    bodies = {branch: _body(made, branch, weights=weights) for branch in ("then_branch", "else_branch")}
    names = [output.name for output in made.graph.output]
    outer = _around(made, helper.make_node("If", ["condition"], names, "choose", **bodies), weights=weights)
    outer.graph.input.append(helper.make_tensor_value_info("condition", onnx.TensorProto.BOOL, []))
    return outer, {"condition": np.array(True)}


def _in_loop(made: ModelProto, *, weights: bool, types: bool = True) -> tuple[ModelProto, Values]:
    """The graph in a loop that runs twice; what both rounds give, stacked. Without `types` its results have none."""
    inputs = [
        helper.make_tensor_value_info("round", onnx.TensorProto.INT64, []),
        helper.make_tensor_value_info("go_on", onnx.TensorProto.BOOL, []),
    ]
    body = _body(made, "body", weights=weights, inputs=inputs)
    body.node.append(helper.make_node("Identity", ["go_on"], ["go_on_too"], "keep_on"))
    body.output.insert(0, helper.make_tensor_value_info("go_on_too", onnx.TensorProto.BOOL, []))
    if not types:
        for value in body.output:
            value.ClearField("type")
    names = [output.name for output in made.graph.output]
    outer = _around(
        made, helper.make_node("Loop", ["rounds", ""], names, "repeat", body=body), weights=weights
    )
    outer.graph.input.append(helper.make_tensor_value_info("rounds", onnx.TensorProto.INT64, []))
    _stack(outer)
    return outer, {"rounds": np.array(2)}


def _stack(outer: ModelProto) -> None:
    """Outputs with a dimension of rounds in front."""
    for output in outer.graph.output:
        if output.type.tensor_type.HasField("shape"):
            dims = list(output.type.tensor_type.shape.dim)
            del output.type.tensor_type.shape.dim[:]
            output.type.tensor_type.shape.dim.add(dim_param="rounds")
            output.type.tensor_type.shape.dim.extend(dims)


def _in_scan(made: ModelProto, *, weights: bool) -> tuple[ModelProto, Values]:
    """The graph in a Scan over two numbers."""
    body = _body(made, "body", weights=weights)
    body.input.append(helper.make_tensor_value_info("number", onnx.TensorProto.FLOAT, []))
    names = [output.name for output in made.graph.output]
    node = helper.make_node("Scan", ["numbers"], names, "scan", body=body, num_scan_inputs=1)
    outer = _around(made, node, weights=weights)
    outer.graph.input.append(helper.make_tensor_value_info("numbers", onnx.TensorProto.FLOAT, [2]))
    _stack(outer)
    return outer, {"numbers": np.zeros(2, np.float32)}


def _nested(made: ModelProto) -> tuple[ModelProto, Values]:
    """An If in a Loop, with the weights around both."""
    inner, condition = _in_if(made, weights=False)
    outer, rounds = _in_loop(inner, weights=False)
    return outer, condition | rounds


def _in_function(made: ModelProto, *, overloads: bool = False) -> tuple[ModelProto, Values]:
    """The graph as a function that gets inputs and weights; with `overloads`, after another of the same name."""
    outer = _copy(made)
    graph = outer.graph
    names = [value.name for value in (*graph.input, *graph.initializer)]
    outputs = [value.name for value in graph.output]
    imports = list(outer.opset_import)
    main = helper.make_function("blocks", "Block", names, outputs, graph.node, imports)
    nodes = [helper.make_node("Block", names, outputs, "model.block", domain="blocks")]
    functions = [main]
    if overloads:
        body = [helper.make_node("Neg", [a], [b], f"minus_{b}") for a, b in (("x", "t"), ("t", "y"))]
        functions.append(
            helper.make_function("blocks", "Block", ["x"], ["y"], body, imports, overload="twice")
        )
        first = helper.make_node(
            "Block", names[:1], ["first"], "model.first", domain="blocks", overload="twice"
        )
        nodes.insert(0, first)
        nodes[1].input[0] = "first"
        main.overload = nodes[1].overload = "main"
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    outer.functions.extend(functions)
    outer.opset_import.append(helper.make_opsetid("blocks", 1))
    outer.ir_version = max(outer.ir_version, 10)
    return outer, {}


def _unnamed(made: ModelProto, *, odd: bool = False) -> tuple[ModelProto, Values]:
    """Dynamic dimensions without a name, or with names that no option can spell; no types inside."""
    outer = _copy(made)
    del outer.graph.value_info[:]
    for value in (*outer.graph.input, *outer.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                name = dim.dim_param
                dim.ClearField("dim_param")
                if odd:
                    dim.dim_param = f"{name}, 2*{name}=?"
    return outer, {}


def _weights_as_inputs(made: ModelProto) -> tuple[ModelProto, Values]:
    """Initializers that are graph inputs as well, as files of IR 3 have them."""
    outer = _copy(made)
    outer.ir_version = 3
    for tensor in outer.graph.initializer:
        outer.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return outer, {}


VARIANTS: Mapping[str, Variant] = {
    "if": lambda made: _in_if(made, weights=True),
    "if, captured": lambda made: _in_if(made, weights=False),
    "loop, captured": lambda made: _in_loop(made, weights=False),
    "loop without types": lambda made: _in_loop(made, weights=True, types=False),
    "scan": lambda made: _in_scan(made, weights=True),
    "scan, captured": lambda made: _in_scan(made, weights=False),
    "if in loop": _nested,
    "function": _in_function,
    "overloads": lambda made: _in_function(made, overloads=True),
    "unnamed": _unnamed,
    "odd names": lambda made: _unnamed(made, odd=True),
    "weights as inputs": _weights_as_inputs,
}
