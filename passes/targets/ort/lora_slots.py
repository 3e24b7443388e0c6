"""Low-rank branches beside the products of a finished graph, whose factors are set when it runs.

    before: y = MatMul(dequantized(quantized(x)), W)
    after:  y = Add(MatMul(dequantized(quantized(x)), W), MatMul(MatMul(x, A), B))

The branch reads x before any quantizer and is computed in the type of x. A [K, rank] and B [rank, N] are inputs of the
graph with initializers of rank 0: who gives none computes what the graph computed before, to the bit. Each pair has a
rank of its own, found at run time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs
from onnx import ModelProto, TensorProto, helper

from passes.graph.from_onnx import import_graph
from passes.graph.match import producer
from passes.graph.modules import Parameter, parameters_of, path_of
from passes.weights.recipe import dtype_of

_ROUNDS = re.compile(r".*(QuantizeLinear|DynamicQuantize|DequantizeLinear)")
_INNER = (".input_quantizer", ".pre_quant_scale")


@dataclass(frozen=True)
class Slot:
    """The slot of one layer: names of its factors' inputs, and the sizes and element type that they must have."""

    module: str
    inputs: int
    outputs: int
    dtype: int

    @property
    def a(self) -> str:
        """The input for A [inputs, rank]."""
        return f"lora.{self.module}.A"

    @property
    def b(self) -> str:
        """The input for B [rank, outputs]."""
        return f"lora.{self.module}.B"


def with_lora_slots(model: ModelProto) -> tuple[ModelProto, dict[str, Slot]]:
    """A copy of `model` with a slot beside every product of a linear layer, and the slots by module path.

    Convolutions, products of two computed tensors, and layers that a pass has joined with others have none.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    nodes = {node.name: index for index, node in enumerate(copy.graph.node)}
    slots: dict[str, Slot] = {}
    added: dict[int, list[onnx.NodeProto]] = {}
    for parameter, x in _products(import_graph(model)):
        module = parameter.name.removesuffix(".weight")
        outputs, inputs = parameter.shape
        index = nodes.get(parameter.node.name)
        if module in slots or index is None:
            continue
        slots[module] = slot = Slot(module, inputs, outputs, dtype_of(x) or TensorProto.FLOAT)
        _declare(copy.graph, slot)
        added[index] = _branch(copy.graph.node[index], slot, x.name)
    ordered = [n for i, node in enumerate(model.graph.node) for n in (copy.graph.node[i], *added.get(i, ()))]
    _replace_nodes(copy.graph, ordered)
    return copy, slots


def _products(graph: gs.Graph) -> Iterator[tuple[Parameter, gs.Tensor]]:
    """Every product of a linear layer, with the tensor that the layer takes in, before quantizers."""
    for parameter in parameters_of(graph):
        is_linear = parameter.node.op in ("MatMul", "Gemm") and parameter.index == 1
        if not is_linear or not parameter.name.endswith(".weight") or len(parameter.shape) != 2:
            continue
        if parameter.node.op == "Gemm" and parameter.node.attrs.get("transA"):
            continue
        yield parameter, _unrounded(parameter.node.inputs[0])


def _unrounded(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before the quantizers of a layer's input, and before the factor of its channels (SmoothQuant, AWQ)."""
    node = producer(tensor)
    while node is not None and (_ROUNDS.fullmatch(node.op) or path_of(node).endswith(_INNER)):
        computed = [t for t in node.inputs if not isinstance(t, gs.Constant)]
        if not computed:
            break
        tensor = computed[0]
        node = producer(tensor)
    return tensor


def _declare(graph: onnx.GraphProto, slot: Slot) -> None:
    """The two inputs and their initializers of rank 0."""
    rank = f"rank of {slot.module}"
    factors: tuple[tuple[str, list[int | str], list[int]], ...] = (
        (slot.a, [slot.inputs, rank], [slot.inputs, 0]),
        (slot.b, [rank, slot.outputs], [0, slot.outputs]),
    )
    for name, shape, empty in factors:
        graph.input.append(helper.make_tensor_value_info(name, slot.dtype, tuple(shape)))
        graph.initializer.append(TensorProto(name=name, data_type=slot.dtype, dims=empty, raw_data=b""))


def _branch(node: onnx.NodeProto, slot: Slot, x: str) -> list[onnx.NodeProto]:
    """The nodes after the product; its output gets another name, so that whoever read it reads the sum."""
    path, output = f"{slot.module}.lora", node.output[0]
    node.output[0] = f"{path}/base"
    return [
        helper.make_node("MatMul", [x, slot.a], [f"{path}/down"], f"{path}/MatMul"),
        helper.make_node("MatMul", [f"{path}/down", slot.b], [f"{path}/up"], f"{path}/MatMul_1"),
        helper.make_node("Add", [f"{path}/base", f"{path}/up"], [output], f"{path}/Add"),
    ]


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    held = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(held)


def slots_to_json(slots: Mapping[str, Slot]) -> dict[str, list[int]]:
    """Module path -> [inputs, outputs, element type], for a manifest."""
    return {module: [slot.inputs, slot.outputs, slot.dtype] for module, slot in slots.items()}
