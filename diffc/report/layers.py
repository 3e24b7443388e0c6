"""The layers of a compiled graph: what each weight is stored in, what its input goes through, and their scales."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.graph.from_onnx import import_graph
from passes.graph.match import producer, weight_recipe
from passes.graph.modules import Parameter, parameters_of
from passes.storage import load
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe, dtype_of

_MOVES = ("Cast", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze")
_BLOCK = re.compile(r"(.*?\.\d+)(?:\.|$)")
_NAMES = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}
_OF_OPERATORS = {"Fp4": "FP4", "FP4": "FP4", "Mxfp8": "FP8", "MXFP8": "FP8"}


@dataclass(frozen=True)
class Side:
    """What one operand goes through: "bfloat16", "FP8", "FP4, blocks of 16, dynamic".

    `low` and `high` are the smallest and the largest scale, None where there is none, or it is found at run time.
    """

    format: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Layer:
    """A product or convolution: its module path, operator, the shape of its weight as torch has it, both operands."""

    path: str
    op: str
    shape: tuple[int, ...]
    weight: Side
    input: Side

    @property
    def block(self) -> str:
        """The block of the backbone that it is in: its path up to the first number, else its first part."""
        match = _BLOCK.match(self.path)
        return match[1] if match else self.path.partition(".")[0]

    @property
    def format(self) -> str:
        """Both operands in one text."""
        weight, given = self.weight.format, self.input.format
        return weight if weight == given else f"{weight} x {given}"


def layers_of(path: Path) -> list[Layer]:
    """Every layer with a weight in the model at `path`, in the order of the graph; scales are read from its weights.

    Raises PassError when the file or its weights are damaged.
    """
    graph = import_graph(load(path))
    seen: dict[str, Layer] = {}
    for found in parameters_of(graph):
        if found.name.endswith(".weight") and found.index == 1 and found.name not in seen:
            seen[found.name] = _layer(found)
    return list(seen.values())


def _layer(found: Parameter) -> Layer:
    weight, shape = _side(found.node.inputs[1])
    if found.transposed and shape:
        shape = tuple(reversed(shape))
    given, _ = _side(found.node.inputs[0])
    return Layer(found.name.removesuffix(".weight"), found.node.op, shape, weight, given)


def _side(tensor: gs.Tensor) -> tuple[Side, tuple[int, ...]]:
    """What `tensor` has gone through, and the shape of the constant at its beginning."""
    kept, node = _moved(tensor)
    if node is None or not node.inputs:
        return Side(_name(dtype_of(kept) or dtype_of(tensor))), _shape(kept)
    if node.op == "DequantizeLinear":
        return _dequantized(node)
    word = next((name for key, name in _OF_OPERATORS.items() if key in node.op), None)
    if word and "Quant" in node.op:
        return Side(f"{word}{_blocks(node)}, dynamic"), ()
    return Side(_name(dtype_of(tensor))), ()


def _moved(tensor: gs.Tensor) -> tuple[gs.Tensor, gs.Node | None]:
    """Where `tensor` comes from through nothing but movement of data, and the node that made that."""
    node = producer(tensor)
    while node is not None and node.op in _MOVES and node.inputs:
        tensor, node = node.inputs[0], producer(node.inputs[0])
    return tensor, node


def _dequantized(node: gs.Node) -> tuple[Side, tuple[int, ...]]:
    codes, maker = _moved(node.inputs[0])
    name = f"{_name(dtype_of(node.inputs[0]) or dtype_of(codes) or _given_type(maker))}{_blocks(node)}"
    dynamic = maker is not None and "Dynamic" in maker.op
    if dynamic:
        return Side(f"{name}, dynamic"), ()
    low, high = _scale(node.inputs[1])
    return Side(name, low, high), _shape(codes)


def _given_type(maker: gs.Node | None) -> int | None:
    """The type of the codes that a QuantizeLinear gives: that of its zero point, or the one that it names."""
    if maker is None or maker.op != "QuantizeLinear":
        return None
    if len(maker.inputs) > 2 and not maker.inputs[2].is_empty():
        return dtype_of(maker.inputs[2])
    return int(maker.attrs.get("output_dtype", onnx.TensorProto.UINT8))


def _blocks(node: gs.Node) -> str:
    size = node.attrs.get("block_size", 0)
    return f", blocks of {size}" if size else ""


def _scale(tensor: gs.Tensor) -> tuple[float | None, float | None]:
    """The smallest and the largest scale; that of a block times that of the scales themselves, where these have one."""
    node = producer(tensor)
    if node is not None and node.op == "DequantizeLinear":
        parts = [_scale(node.inputs[0]), _scale(node.inputs[1])]
        (low, high), (least, most) = parts
        if low is None or high is None or least is None or most is None:
            return None, None
        return low * least, high * most
    if node is not None and node.op in _MOVES and node.inputs:
        return _scale(node.inputs[0])
    recipe = _recipe(tensor)
    if recipe is None:
        return None, None
    values = np.abs(evaluate(recipe).astype(np.float32))
    positive = values[values > 0]
    return (float(positive.min()), float(positive.max())) if positive.size else (0.0, 0.0)


def _recipe(tensor: gs.Tensor) -> Recipe | None:
    node = producer(tensor)
    if node is not None and node.op == "Constant":
        held = node.attrs.get("value")
        return None if held is None else weight_recipe(held)
    return weight_recipe(tensor)


def _shape(tensor: gs.Tensor) -> tuple[int, ...]:
    recipe = _recipe(tensor)
    return () if recipe is None else recipe.shape


def _name(dtype: Any) -> str:
    """An element type of ONNX in the words of the documents."""
    if not dtype:
        return "unknown"
    name: str = onnx.TensorProto.DataType.Name(int(dtype))
    return _NAMES.get(name, name.lower())


def blocks_of(layers: list[Layer]) -> Iterator[str]:
    """The blocks of these layers, each once."""
    yield from dict.fromkeys(layer.block for layer in layers)
