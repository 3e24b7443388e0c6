"""fold-weight-qdq: a weight that is quantized in the graph is stored quantized, in one byte or a nibble."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register
from passes.graph.edit import Edit
from passes.graph.grids import quantized_type
from passes.graph.match import View, held_values, input_of, permutation, producer, weight_recipe
from passes.graph.trt_ops import FOUR_OVER_SIX
from passes.weights.recipe import Recipe, constant

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
       become constants, computed as ModelOpt does. With the attribute `four_over_six`, which only a weight may have,
       the largest of a block becomes 6 or 4.
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
        made: dict[str, gs.Constant] = {}  # by recipe: what two quantizers ask for is stored once

        def rewrite(found: _Found, edit: Edit) -> None:
            _rewrite(found, edit, made)

        return Edit(graph).rewrite_each(self.match, rewrite, "weights stored quantized")

    def match(self, node: gs.Node, view: View) -> _Found | str | None:
        """A quantizer of a constant with what each of its outputs is."""
        if node.op not in ("QuantizeLinear", *_DYNAMIC):
            return None
        weight = _resolve(node.inputs[0], self.deep)
        if weight is None:
            return None
        return (_dynamic if node.op in _DYNAMIC else _linear)(node, *weight, view)


@dataclass(frozen=True)
class _Found:
    """A quantizer of the constant `name`, the recipe of each output, and what the constants are called after."""

    node: gs.Node
    name: str
    recipes: tuple[Recipe, ...]
    suffixes: tuple[str, ...]


_FP4 = "TRT_FP4DynamicQuantize"
_DYNAMIC = (_FP4, "TRT_MXFP8DynamicQuantize")


def _rewrite(found: _Found, edit: Edit, made: dict[str, gs.Constant]) -> None:
    """QuantizeLinear(w, s, z)  ->  w_q;  TRT_FP4DynamicQuantize(w, s)  ->  w_q and w_scale"""
    for output, recipe, suffix in zip(found.node.outputs, found.recipes, found.suffixes, strict=True):
        key = json.dumps(recipe.to_json(), sort_keys=True)
        if key not in made:
            made[key] = constant(edit.names.fresh(f"{found.name}_{suffix}"), recipe)
        edit.replace_uses(output, made[key])
    edit.remove(found.node)


def _dynamic(node: gs.Node, name: str, weight: Recipe, view: View) -> _Found | str:
    """Values and scales of a dynamic block quantizer, or why it must stay."""
    scale = _resolve(node.inputs[1]) if len(node.inputs) > 1 else None
    reason = _dynamic_reason(node, weight, scale, view)
    if reason:
        return reason
    size = node.attrs["block_size"]
    if node.op == _FP4 and scale is not None:
        way = {"four_six": bool(node.attrs.get(FOUR_OVER_SIX, 0))}
        recipes = weight.nvfp4_values(scale[1], size, **way), weight.nvfp4_scales(scale[1], size, **way)
    else:
        recipes = weight.mxfp8_values(size), weight.mxfp8_scales(size)
    return _Found(node, name, recipes, ("q", "scale"))


def _linear(node: gs.Node, name: str, weight: Recipe, view: View) -> _Found | str:
    """The values of a QuantizeLinear, or why it must stay."""
    scale = _resolve(node.inputs[1])
    reason = _linear_reason(node, view)
    if reason or scale is None:
        return reason or "the scale is not constant"
    axis = _axis(node, scale[1], weight)
    quantized = weight.quantize(scale[1], quantized_type(node), axis, node.attrs.get("block_size", 0))
    return _Found(node, name, (quantized,), ("q",))


def _axis(node: gs.Node, scale: Recipe, weight: Recipe) -> int | None:
    """The axis along which a quantizer has its scales; None for one scale."""
    return None if scale.shape in ((), (1,)) else int(node.attrs.get("axis", 1) % len(weight.shape))


def _linear_reason(node: gs.Node, view: View) -> str:
    """Why a QuantizeLinear must stay, or nothing."""
    out = node.outputs[0]
    others = [user for user in out.outputs if user.op != "DequantizeLinear"]
    if others or id(out) in view.outputs:
        reader = f"{others[0].op} node {others[0].name!r}" if others else "the caller (a graph output)"
        return f"the quantized weight is read by {reader}, not only by DequantizeLinear"
    if quantized_type(node) not in STORED:
        return f"no recipe quantizes to {TensorProto.DataType.Name(quantized_type(node))}"
    zero = input_of(node, 2)
    if zero is None:
        return ""
    zero_point = held_values(zero)
    if zero_point is None:
        return "the zero point is not an inline constant"
    return "the zero point is not zero" if np.any(zero_point.astype(np.float32)) else ""


def _dynamic_reason(node: gs.Node, weight: Recipe, scale: tuple[str, Recipe] | None, view: View) -> str:
    """Why a dynamic block quantizer of a constant must stay, or nothing."""
    if node.op == _FP4 and scale is None:
        return "the scale is not constant"
    if any(id(output) in view.outputs for output in node.outputs):
        return "the quantized weight is a graph output"
    axis, size = node.attrs.get("axis", -1), node.attrs.get("block_size", 0)
    if axis not in (-1, len(weight.shape) - 1):
        return f"its blocks lie along axis {axis}, and weights are stored in blocks of the last one"
    return "" if size and weight.shape[-1] % size == 0 else f"{weight.shape} is not whole blocks of {size}"


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
        return found[0], found[1].transpose(permutation(node, len(found[1].shape)))
    if node.op not in ("Identity", "Cast") or (found := _resolve(node.inputs[0], deep)) is None:
        return None
    return found if node.op == "Identity" else (found[0], found[1].cast(node.attrs["to"]))


def _dequantized(node: gs.Node) -> tuple[str, Recipe] | None:
    """What a DequantizeLinear gives whose inputs are all constant."""
    weight, scale = _resolve(node.inputs[0]), _resolve(node.inputs[1])
    if weight is None or scale is None:
        return None
    axis = _axis(node, scale[1], weight[1])
    return weight[0], weight[1].dequantize(scale[1], axis, node.attrs.get("block_size", 0))
