"""add-zero-bias: keeps TensorRT from merging NVFP4 layers in a way that its FP8 attention cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Edit
from passes.graph.grids import identity
from passes.graph.match import STANDARD, View, bias_add, dims, is_op, producer
from passes.graph.movement import MOVES
from passes.weights.recipe import dtype_of

_LAYOUT = ("Transpose", "Reshape", "Cast", "Identity")
_ARITHMETIC = ("Add", "Mul", "Div")  # with constants: TensorRT takes a factor into the layer's scale


@dataclass(frozen=True)
class Layer:
    """A product of `columns` channels in `dtype`, an onnx.TensorProto element type."""

    product: gs.Node
    columns: int
    dtype: int


@register
@dataclass(frozen=True)
class AddZeroBias(Pass):
    """Add -0.0 to the output of NVFP4 layers without a bias that TensorRT would merge before FP8 attention.

        before: MatMul(x, W)        after: Add(MatMul(x, W), zeros), zeros [columns] of -0.0

    TensorRT-RTX 1.7.1 makes one product of layers that read the same NVFP4 input and whose weights have the same
    global scale. Where such a product is split into heads and quantized to FP8 for attention, the builder fails:
    `CHECK(perm.size() == t.size())`. Weights meet in a scale by chance, often among the 140 text projections of
    SDXL, or because ModelOpt gave them one. Layers with a bias build, and x + -0.0 is x for every x, -0.0 too. One
    number for each column, since ONNX Runtime's optimizer removes the addition of a single zero.

    On a MatMul of an input with a weight that is dequantized from constant FLOAT4E2M1, when another MatMul has the same
    input and an equal global scale, one of them reaches a QuantizeLinear to FLOAT8E4M3FN through nothing but moves of
    data and Add, Mul, Div with constants, and not all that read its output add a bias [columns].

    Declines when: the number of columns or the type is not known.
    """

    name: ClassVar[str] = "add-zero-bias"

    def run(self, graph: gs.Graph) -> PassResult:
        """Each layer gets an output of its own; the Add gives the tensor that was the layer's."""
        chosen = {id(node) for part in walk(graph) for node in _chosen(part)}

        def match(node: gs.Node, view: View) -> Layer | str | None:
            return self.match(node, view) if id(node) in chosen else None

        return Edit(graph).rewrite_each(match, self.rewrite, "NVFP4 layers get a bias of zeros")

    def match(self, node: gs.Node, _view: View) -> Layer | str:
        """A layer that TensorRT would merge."""
        columns, dtype = (dims(node.outputs[0]) or [None])[-1], dtype_of(node.outputs[0])
        if not isinstance(columns, (int, np.integer)) or dtype is None:
            return f"columns or type of {node.outputs[0].name!r} are not known"
        return Layer(node, int(columns), dtype)

    def rewrite(self, found: Layer, edit: Edit) -> None:
        """The product gives a new tensor, and its sum with zeros the old one; layers alike share their zeros."""
        node, new, (value,) = found.product, edit.at(found.product, after=True), found.product.outputs
        inner = gs.Variable(edit.names.fresh(f"{node.name}/product"), value.dtype, value.shape)
        node.outputs = [inner]
        key = (found.columns, found.dtype)
        if key not in edit.made:
            kind = onnx.helper.tensor_dtype_to_np_dtype(found.dtype)
            edit.made[key] = new.constant("zero_bias", np.full(found.columns, -0.0, kind))
        new.emit_to("Add", [inner, edit.made[key]], [value])


def _chosen(part: gs.Graph) -> Iterator[gs.Node]:
    """The layers without a bias that TensorRT would merge with others, one of which leads to FP8 attention."""
    groups: dict[tuple[int, str], list[gs.Node]] = {}
    for node in part.nodes:
        if (scale := _global_scale(node)) is not None:
            groups.setdefault((id(node.inputs[0]), identity(scale)), []).append(node)
    reached = {id(node) for node in _layers_of_attention(part)}
    for group in groups.values():
        if len(group) > 1 and any(id(member) in reached for member in group):
            yield from (node for node in group if not _has_bias(node))


def _global_scale(node: gs.Node) -> gs.Tensor | None:
    """The scale of the block scales of a MatMul's NVFP4 weight; None for anything else."""
    if not is_op(node, "MatMul"):
        return None
    values = producer(node.inputs[1])
    while values is not None and values.op in _LAYOUT:
        values = producer(values.inputs[0])
    if values is None or values.op != "DequantizeLinear":
        return None
    weight, blocks = values.inputs[0], producer(values.inputs[1])
    if not isinstance(weight, gs.Constant) or dtype_of(weight) != TensorProto.FLOAT4E2M1:
        return None
    return blocks.inputs[1] if blocks is not None and blocks.op == "DequantizeLinear" else None


def _has_bias(node: gs.Node) -> bool:
    """Whether all that read the output of a layer add a bias to it."""
    value = node.outputs[0]
    added = (bias_add(reader) for reader in value.outputs)
    return bool(value.outputs) and all(found is not None and found[0] is value for found in added)


def _layers_of_attention(part: gs.Graph) -> Iterator[gs.Node]:
    """The MatMuls whose outputs are quantized to FP8 with nothing but moves and constant factors in between."""
    for quantizer in part.nodes:
        if quantizer.op != "QuantizeLinear" or dtype_of(quantizer.outputs[0]) != TensorProto.FLOAT8E4M3FN:
            continue
        node = producer(quantizer.inputs[0])
        while node is not None and (tensor := _passed_on(node)) is not None:
            node = producer(tensor)
        if node is not None and node.op == "MatMul":
            yield node


def _passed_on(node: gs.Node) -> gs.Tensor | None:
    """What a move of data moves, or a constant is added to or multiplied with; None for other nodes."""
    if node.domain not in STANDARD:
        return None
    if node.op in MOVES or node.op == "Cast":
        return node.inputs[0]
    variables = [tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)]
    return variables[0] if node.op in _ARITHMETIC and len(variables) == 1 else None
