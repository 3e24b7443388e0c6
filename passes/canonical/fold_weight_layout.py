"""fold-weight-layout: a weight is stored as its readers want it, so nothing moves it at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, register
from passes.graph.constants import constant_ints, reshaped
from passes.graph.edit import Declined, Edit, inline
from passes.graph.match import array_of, is_weight, permutation
from passes.weights.recipe import Recipe, RecipeValues, bits_of, constant, recipe_of

_LAYOUTS = ("Transpose", "Reshape", "Cast", "Identity")


@register
@dataclass(frozen=True)
class FoldWeightLayout(Pass):
    """Move data movement on weights into their recipes.

    1. recipe -> Transpose, Reshape to a constant shape, Cast to a type that is not wider, or Identity
       becomes the recipe with that operation; repeated along a chain.
    2. recipe -> DequantizeLinear -> Transpose, Reshape or Identity: the same, in front of the
       DequantizeLinear, whose axis (and block scales) move along.

        before: MatMul(x, Transpose(DequantizeLinear(w, s, axis=0)))
        after:  MatMul(x, DequantizeLinear(w transposed, s, axis=1))

    Declines when: the readers of the weight want different layouts (it would be stored twice); a Cast widens (it would
    be stored larger) or follows DequantizeLinear (other rounding); a Reshape mixes the quantized axis with another; the
    moved tensor is an output.
    """

    name: ClassVar[str] = "fold-weight-layout"

    def run(self, graph: gs.Graph) -> PassResult:
        """Visit every recipe constant until none of its readers moves it."""
        edit, changed = Edit(graph), 0
        for part in edit.view.parts:
            for tensor in part.tensors().values():
                while recipe_of(tensor) is not None and (found := _found(tensor, edit)) is not None:
                    _rewrite(found, edit)
                    changed += len(found.movers)
        return edit.finish({"operations moved into weights": changed})


@dataclass(frozen=True)
class _Found:
    """A weight whose readers `movers` all do the same to it, directly or after the DequantizeLinear nodes `scales`.

    `op`, `argument`: what they do, as a method of `Recipe`. `axes`: that of each of `scales` after the move.
    """

    weight: gs.Constant
    recipe: Recipe
    scales: Sequence[gs.Node]
    movers: Sequence[gs.Node]
    op: str
    argument: Any
    axes: Sequence[int | None]


def _found(weight: gs.Constant, edit: Edit) -> _Found | None:
    """What all readers of `weight` have in common; a refusal where one moves it and it must stay."""
    readers = edit.readers(weight)
    scales = [node for node in readers if node.op == "DequantizeLinear" and node.inputs[0] is weight]
    if scales and len(scales) == len(readers):
        movers = [node for scale in scales for node in edit.readers(scale.outputs[0])]
    else:
        movers, scales = readers, []
    first = next((node for node in movers if node.op in _LAYOUTS), None)
    if first is None:
        return None
    try:
        return _common(weight, scales, movers, edit)
    except Declined as reason:
        edit.decline(first, f"weight {weight.name!r}: {reason}")
        return None


def _common(weight: gs.Constant, scales: Sequence[gs.Node], movers: Sequence[gs.Node], edit: Edit) -> _Found:
    """The one layout that all movers want. Raises Declined."""
    recipe = _recipe(weight)
    layouts = [_layout(node, recipe.shape) for node in movers]
    if any(layout != layouts[0] for layout in layouts):
        raise Declined("its readers want different layouts, and it would be stored twice")
    if any(id(node.outputs[0]) in edit.view.outputs for node in (*scales, *movers)):
        raise Declined("the moved tensor is a graph output")
    op, argument = layouts[0]
    if op == "cast" and not scales and bits_of(argument) > bits_of(recipe.dtype):
        raise Declined("the Cast widens it, and it would be stored in more bytes")
    axes = [_moved_axis(node, op, argument, recipe.shape) for node in scales]
    for node, axis in zip(scales, axes, strict=True):
        for tensor in node.inputs[1:] if axis is not None else ():
            if not is_weight(tensor):
                raise Declined(f"its scale {tensor.name!r} is not constant")
    return _Found(weight, recipe, scales, movers, op, argument, axes)


def _rewrite(found: _Found, edit: Edit) -> None:
    """Store the weight as the movers give it, and let their readers read it."""
    # Transpose(w)  ->  w transposed;  Transpose(DequantizeLinear(w, s))  ->  DequantizeLinear(w transposed, s)
    weight, op = found.weight, found.op
    new = found.recipe if op == "identity" else getattr(found.recipe, op)(found.argument)
    for node, axis in zip(found.scales, found.axes, strict=True):
        _move_scale(node, axis, found, new.shape, edit)
    weight.values = RecipeValues(new.to_tensor(weight.name))
    for node in found.movers:
        edit.replace_uses(node.outputs[0], node.inputs[0])
        edit.remove(node)


def _move_scale(node: gs.Node, axis: int | None, found: _Found, shape: tuple[int, ...], edit: Edit) -> None:
    """Give a DequantizeLinear its new axis, its block scales in the new layout, its new output shape."""
    node.outputs[0].shape = list(shape)
    if axis is None:
        return
    node.attrs["axis"] = axis
    for index in range(1, len(node.inputs)):
        tensor = node.inputs[index]
        if found.op == "transpose" and len(tensor.shape) == len(shape) > 1:
            node.inputs[index] = _transposed(tensor, found.argument, edit)


def _transposed(tensor: gs.Constant, perm: tuple[int, ...], edit: Edit) -> gs.Constant:
    """A constant of block scales with its axes in the order `perm`."""
    name, recipe = edit.names.fresh(f"{tensor.name}_t"), recipe_of(tensor)
    if recipe is not None:
        return constant(name, recipe.transpose(perm))
    array = array_of(tensor)
    assert array is not None, "is_weight said that its values are known"
    return inline(name, array.transpose(perm))


def _recipe(weight: gs.Constant) -> Recipe:
    recipe = recipe_of(weight)
    if recipe is None:
        raise Declined("it has no recipe")
    return recipe


def _layout(node: gs.Node, shape: tuple[int, ...]) -> tuple[str, Any]:
    """What a node does to the weight, as a method of `Recipe` and its argument. Raises Declined."""
    if node.op == "Transpose":
        return "transpose", permutation(node, len(shape))
    if node.op == "Cast":
        return "cast", int(node.attrs["to"])
    if node.op == "Identity":
        return "identity", None
    if node.op != "Reshape":
        raise Declined("its readers want different layouts, and it would be stored twice")
    target = constant_ints(node, 1)
    if target is None:
        raise Declined(f"the shape of Reshape node {node.name!r} is not constant")
    reached = reshaped(node, shape)
    if reached is None:
        raise Declined(
            f"Reshape node {node.name!r} gives {target}, which has another size than {list(shape)}"
        )
    return "reshape", reached


def _moved_axis(node: gs.Node, op: str, argument: Any, shape: tuple[int, ...]) -> int | None:
    """The axis of a DequantizeLinear after the move; None when it is per tensor. Raises Declined."""
    if op == "cast":
        raise Declined("a Cast after DequantizeLinear rounds differently")
    if len(node.inputs[1].shape or ()) == 0 or math.prod(node.inputs[1].shape) == 1:
        return None
    axis: int = node.attrs.get("axis", 1) % len(shape)
    if op == "transpose":
        return int(argument.index(axis))
    if op == "identity":
        return axis
    before = math.prod(shape[:axis])
    for index, dim in enumerate(argument):
        if dim == shape[axis] and math.prod(argument[:index]) == before and not node.attrs.get("block_size"):
            return index
    raise Declined("a Reshape mixes its quantized axis with another")
