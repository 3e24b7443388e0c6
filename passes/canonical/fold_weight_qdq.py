"""fold-weight-qdq: a weight that is quantized in the graph is stored quantized, in one byte or a nibble."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Names, drop_nodes, replace_uses
from passes.graph.match import array_of, output_ids, producer, weight_recipe
from passes.weights.recipe import Array, Recipe, constant, dtype_of

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

    3. constant -> trt::TRT_FP4DynamicQuantize or trt::TRT_MXFP8DynamicQuantize along the last axis: both outputs
       become constants, computed as ModelOpt does.
    4. With `deep`, a weight that is dequantized first and then quantized again (INT4 blocks computed with in FP8)
       becomes one constant of the second type: what a compiler does when it builds, and what validation
       does; it is not done for storage, since the first type is the smaller one. A Transpose between the two
       goes along (fuse-qdq puts it there).

        before: DequantizeLinear(QuantizeLinear(w, s, z), s, z)      after: DequantizeLinear(w_q, s, z)

    Two QuantizeLinear nodes that ask for the same bytes share one constant.

    Declines when: the zero point is not a constant zero; the scale is not constant; the type has no recipe (UINT8,
    FLOAT8E5M2 ...); anything but DequantizeLinear reads the quantized weight.
    """

    name: ClassVar[str] = "fold-weight-qdq"
    deep: bool = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every quantizer on a constant."""
        work = _Work(Names(graph), output_ids(graph))
        for part in walk(graph):
            for node in part.nodes:
                if node.op not in ("QuantizeLinear", *_DYNAMIC):
                    continue
                weight = _resolve(node.inputs[0], self.deep)
                if weight is not None:
                    (work.visit_dynamic if node.op in _DYNAMIC else work.visit)(node, *weight)
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

    def visit_dynamic(self, node: gs.Node, name: str, weight: Recipe) -> None:
        """Replace both outputs of a dynamic block quantizer, if it works along the last axis."""
        scale = _resolve(node.inputs[1]) if len(node.inputs) > 1 else None
        reason = _dynamic_reason(node, weight, scale, self.outputs)
        if reason:
            self.refusals.append(Refusal(node.name, reason))
            return
        size = node.attrs["block_size"]
        if node.op == _FP4 and scale is not None:
            pair = weight.nvfp4_values(scale[1], size), weight.nvfp4_scales(scale[1], size)
        else:
            pair = weight.mxfp8_values(size), weight.mxfp8_scales(size)
        for output, recipe, suffix in zip(node.outputs, pair, ("q", "scale"), strict=True):
            key = json.dumps(recipe.to_json(), sort_keys=True)
            if key not in self.made:
                self.made[key] = constant(self.names.fresh(f"{name}_{suffix}"), recipe)
            replace_uses(output, self.made[key])
        self.dead.add(id(node))

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
        zero_point = _constant_array(node.inputs[2])
        if zero_point is None:
            return "the zero point is not an inline constant"
        return "the zero point is not zero" if np.any(zero_point.astype(np.float32)) else ""


_FP4 = "TRT_FP4DynamicQuantize"
_DYNAMIC = (_FP4, "TRT_MXFP8DynamicQuantize")


def _dynamic_reason(
    node: gs.Node, weight: Recipe, scale: tuple[str, Recipe] | None, outputs: set[int]
) -> str:
    """Why a dynamic block quantizer of a constant must stay, or nothing."""
    if node.op == _FP4 and scale is None:
        return "the scale is not constant"
    if any(id(output) in outputs for output in node.outputs):
        return "the quantized weight is a graph output"
    axis, size = node.attrs.get("axis", -1), node.attrs.get("block_size", 0)
    if axis not in (-1, len(weight.shape) - 1):
        return f"its blocks lie along axis {axis}, and weights are stored in blocks of the last one"
    return "" if size and weight.shape[-1] % size == 0 else f"{weight.shape} is not whole blocks of {size}"


def _constant_array(tensor: gs.Tensor) -> Array | None:
    """The values of an inline constant or of a Constant node."""
    node = producer(tensor)
    return array_of(node.attrs["value"] if node is not None and "value" in node.attrs else tensor)


def _target(node: gs.Node) -> int:
    """The type that a QuantizeLinear makes: of its zero point, else of the attribute, else UINT8."""
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return dtype_of(node.inputs[2]) or TensorProto.UNDEFINED
    return int(node.attrs.get("output_dtype", 0)) or int(TensorProto.UINT8)


def _resolve(tensor: gs.Tensor, deep: bool = False) -> tuple[str, Recipe] | None:
    """Name and recipe of the constant that reaches a tensor through Identity and Cast; None when there is none.

    With `deep`, through DequantizeLinear and Transpose as well.
    """
    node = producer(tensor)
    if node is None:
        recipe = weight_recipe(tensor)
        return None if recipe is None else (tensor.name, recipe)
    if deep and node.op == "DequantizeLinear":
        return _dequantized(node)
    if deep and node.op == "Transpose" and (found := _resolve(node.inputs[0], deep)) is not None:
        perm = node.attrs.get("perm") or reversed(range(len(found[1].shape)))
        return found[0], found[1].transpose(tuple(perm))
    if node.op not in ("Identity", "Cast") or (found := _resolve(node.inputs[0], deep)) is None:
        return None
    return found if node.op == "Identity" else (found[0], found[1].cast(node.attrs["to"]))


def _dequantized(node: gs.Node) -> tuple[str, Recipe] | None:
    """What a DequantizeLinear gives whose inputs are all constant."""
    weight, scale = _resolve(node.inputs[0]), _resolve(node.inputs[1])
    if weight is None or scale is None:
        return None
    per_tensor = scale[1].shape in ((), (1,))
    axis = None if per_tensor else node.attrs.get("axis", 1) % len(weight[1].shape)
    return weight[0], weight[1].dequantize(scale[1], axis, node.attrs.get("block_size", 0))
