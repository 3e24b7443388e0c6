"""add-zero-bias: keeps TensorRT from merging NVFP4 layers in a way that its FP8 attention cannot take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Names, inline
from passes.graph.grids import identity
from passes.graph.match import STANDARD, producer
from passes.graph.movement import MOVES
from passes.weights.recipe import dtype_of

_LAYOUT = ("Transpose", "Reshape", "Cast", "Identity")
_ARITHMETIC = ("Add", "Mul", "Div")  # with constants: TensorRT takes a factor into the layer's scale


@register
@dataclass(frozen=True)
class AddZeroBias(Pass):
    """Add -0.0 to the output of NVFP4 layers without a bias that TensorRT would merge in front of FP8 attention.

    TensorRT-RTX 1.7.1 makes one product of layers that read the same NVFP4 input and whose weights have the same
    global scale. Where such a product is split into heads and quantized to FP8 for attention, the builder fails:
    `CHECK(perm.size() == t.size())`. Weights meet in a scale by chance, often among the 140 text projections of
    SDXL, or because ModelOpt gave them one. Layers with a bias build, and x + -0.0 is x for every x, -0.0 too. One
    number for each column, since ONNX Runtime's optimizer removes the addition of a single zero.

    Fires on a MatMul of an input with a weight that is dequantized from constant FLOAT4E2M1, when another MatMul has
    the same input and an equal global scale, one of them reaches a QuantizeLinear to FLOAT8E4M3FN through nothing but
    moves of data and Add, Mul, Div with constants, and not all that read its output add a constant. Not where the
    number of columns or the type is not known.
    """

    name: ClassVar[str] = "add-zero-bias"

    def run(self, graph: gs.Graph) -> PassResult:
        """Each layer gets an output of its own; the Add gives the tensor that was the layer's."""
        work = _Work(Names(graph))
        for part in walk(graph):
            chosen = _chosen(part)
            if chosen:
                part.nodes = [new for node in part.nodes for new in work.biased(node, id(node) in chosen)]
        notes = (f"{work.count} NVFP4 layers get a bias of zeros",) if work.count else ()
        return PassResult(work.count, notes, tuple(work.refusals))


@dataclass
class _Work:
    """Fresh names, the biases made so far by columns and type, and what was done."""

    names: Names
    zeros: dict[tuple[int, int], gs.Constant] = field(default_factory=dict)
    count: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    def biased(self, node: gs.Node, fires: bool) -> list[gs.Node]:
        """The node, and behind it the Add when the pass fires."""
        if not fires:
            return [node]
        (value,) = node.outputs
        columns, dtype = (value.shape or [None])[-1], dtype_of(value)
        if not isinstance(columns, (int, np.integer)) or dtype is None:
            self.refusals.append(Refusal(node.name, f"columns or type of {value.name!r} are not known"))
            return [node]
        inner = gs.Variable(self.names.fresh(f"{node.name}/product"), value.dtype, value.shape)
        node.outputs = [inner]
        self.count += 1
        bias = self._bias(node, int(columns), dtype)
        return [node, gs.Node("Add", self.names.fresh(f"{node.name}/Add"), {}, [inner, bias], [value])]

    def _bias(self, node: gs.Node, columns: int, dtype: int) -> gs.Constant:
        if (columns, dtype) not in self.zeros:
            kind: Any = onnx.helper.tensor_dtype_to_np_dtype(dtype)
            name = self.names.fresh(f"{node.name}/zero_bias")
            self.zeros[columns, dtype] = inline(name, np.full(columns, -0.0, kind))
        return self.zeros[columns, dtype]


def _chosen(part: gs.Graph) -> set[int]:
    """`id()` of the MatMuls to change."""
    groups: dict[tuple[int, str], list[gs.Node]] = {}
    for node in part.nodes:
        if (scale := _global_scale(node)) is not None:
            groups.setdefault((id(node.inputs[0]), identity(scale)), []).append(node)
    reached = {id(node) for node in _layers_of_attention(part)}
    return {
        id(node)
        for group in groups.values()
        if len(group) > 1 and any(id(member) in reached for member in group)
        for node in group
        if not _has_bias(node)
    }


def _global_scale(node: gs.Node) -> gs.Tensor | None:
    """The scale of the block scales of a MatMul's NVFP4 weight; None for anything else."""
    if node.op != "MatMul" or node.domain not in STANDARD:
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
    readers = node.outputs[0].outputs
    return bool(readers) and all(
        reader.op == "Add" and any(isinstance(tensor, gs.Constant) for tensor in reader.inputs)
        for reader in readers
    )


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
