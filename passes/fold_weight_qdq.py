"""fold-weight-qdq: a weight that is quantized in the graph is stored quantized, in one byte or a nibble."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graphs import Names, array_of, drop_nodes, output_ids, producer, replace_uses, weight_recipe
from passes.weights import Array, Recipe, constant, dtype_of

# The types that `Recipe.quantize` makes; all are symmetric in ModelOpt.
STORED = frozenset({TensorProto.INT8, TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.FLOAT4E2M1})


@register
@dataclass(frozen=True)
class FoldWeightQdq(Pass):
    """Move the quantization of a weight out of the graph and into its recipe.

    1. constant -> QuantizeLinear -> DequantizeLinear becomes quantized constant -> DequantizeLinear, when
       scale and zero point are constant and the zero point is zero or left out. Per tensor, per channel
       and in blocks.
    2. The same with Identity or Cast nodes between the constant and QuantizeLinear, or between a constant
       scale and its use; they go into the recipe.

    Two QuantizeLinear nodes that ask for the same bytes share one constant.

    Not when the zero point is not zero or not constant, the scale is not constant, the type has no recipe
    (UINT8, FLOAT8E5M2 ...), or something other than DequantizeLinear reads the quantized weight.
    """

    name: ClassVar[str] = "fold-weight-qdq"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every QuantizeLinear on a constant."""
        work = _Work(Names(graph), output_ids(graph))
        for part in walk(graph):
            for node in part.nodes:
                if node.op == "QuantizeLinear" and (weight := _resolve(node.inputs[0])) is not None:
                    work.visit(node, *weight)
        drop_nodes(graph, work.dead)
        changed = len(work.dead)
        notes = (f"{changed} weights stored quantized",) if changed else ()
        return PassResult(changed, notes, tuple(work.refusals))


@dataclass
class _Work:
    """One sweep: fresh names, the constants made so far by recipe, what to drop, what was refused."""

    names: Names
    outputs: set[int]
    made: dict[str, gs.Constant] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)

    def visit(self, node: gs.Node, name: str, weight: Recipe) -> None:
        scale = _resolve(node.inputs[1])
        reason = self._reason(node) or ("the scale is not constant" if scale is None else "")
        if reason or scale is None:
            self.refusals.append(Refusal(node.name, reason))
            return
        axis = None if scale[1].shape in ((), (1,)) else node.attrs.get("axis", 1) % len(weight.shape)
        block_size = node.attrs.get("block_size", 0)
        quantized = weight.quantize(scale[1], _target(node), axis, block_size)
        key = json.dumps(quantized.to_json(), sort_keys=True)
        if key not in self.made:
            self.made[key] = constant(self.names.fresh(f"{name}_q"), quantized)
        replace_uses(node.outputs[0], self.made[key])
        self.dead.add(id(node))

    def _reason(self, node: gs.Node) -> str:
        """Why the node must stay, or nothing."""
        out = node.outputs[0]
        others = [user for user in out.outputs if user.op != "DequantizeLinear"]
        if others or id(out) in self.outputs:
            reader = f"{others[0].op} node {others[0].name!r}" if others else "the caller (a graph output)"
            return f"the quantized weight is read by {reader}, not only by DequantizeLinear"
        if _target(node) not in STORED:
            return f"no recipe quantizes to {TensorProto.DataType.Name(_target(node))}"
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            return ""
        zero_point = _array_behind(node.inputs[2])
        if zero_point is None:
            return "the zero point is not an inline constant"
        return "the zero point is not zero" if np.any(zero_point.astype(np.float32)) else ""


def _array_behind(tensor: gs.Tensor) -> Array | None:
    """The values of an inline constant or of a Constant node."""
    node = producer(tensor)
    return array_of(node.attrs["value"] if node is not None and "value" in node.attrs else tensor)


def _target(node: gs.Node) -> int:
    """The type that a QuantizeLinear makes: of its zero point, else of the attribute, else UINT8."""
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return dtype_of(node.inputs[2]) or TensorProto.UNDEFINED
    return int(node.attrs.get("output_dtype", 0)) or int(TensorProto.UINT8)


def _resolve(tensor: gs.Tensor) -> tuple[str, Recipe] | None:
    """Name and recipe of the constant behind a tensor, through Identity and Cast; None when there is none."""
    node = producer(tensor)
    if node is None:
        recipe = weight_recipe(tensor)
        return None if recipe is None else (tensor.name, recipe)
    if node.op not in ("Identity", "Cast") or (found := _resolve(node.inputs[0])) is None:
        return None
    return found if node.op == "Identity" else (found[0], found[1].cast(node.attrs["to"]))
