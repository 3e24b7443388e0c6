"""Small graphs that take only some sizes of their dynamic dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def network(nodes: list[Any], dims: list[Any], **constants: Any) -> onnx.ModelProto:
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    values = [
        helper.make_tensor_value_info(name, FLOAT, dims if name == "x" else None) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name=f"{kind}_{output}", **attributes)


def positions(tokens: int) -> onnx.ModelProto:
    """Tokens that a table of positions was added to, as FLUX's exports have it, and a product."""
    rng = np.random.default_rng(tokens)
    table = rng.normal(size=(1, tokens, 8)).astype(np.float32)
    weight = rng.normal(size=(8, 8)).astype(np.float32)
    return network(
        [node("Add", "x table", "a"), node("MatMul", "a w", "y")],
        ["batch", "tokens", 8],
        table=table,
        w=weight,
    )


def film(*, moving: bool) -> onnx.ModelProto:
    """Frames, rows and columns in one row of 60 tokens; of the shape that the input has where `moving`."""
    to: list[Any] = [1, 60, 4]
    nodes = [node("Reshape", "x to", "rows"), node("Softmax", "rows", "y", axis=1)]
    return network(nodes, ["batch", "frames", "height", "width", 4], to=[0, -1, 4] if moving else to)


def unet() -> onnx.ModelProto:
    """Two levels that halve, and skip connections."""
    weight = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    down = {"pads": [1] * 4, "strides": [2, 2]}
    up = {"mode": "nearest"}
    nodes = [
        node("Conv", "x w", "a", **down),
        node("Conv", "a w", "b", **down),
        node("Resize", "b  twice", "c", **up),
        node("Add", "c a", "d"),
        node("Resize", "d  twice", "e", **up),
        node("Add", "e x", "y"),
    ]
    nodes[2].input[:] = ["b", "", "twice"]
    nodes[4].input[:] = ["d", "", "twice"]
    return network(nodes, ["batch", 4, "height", "width"], w=weight, twice=np.float32([1, 1, 2, 2]))
