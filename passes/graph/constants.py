"""Constants before chains of nodes that only relabel or pad them, as exporters leave such chains around weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from passes.graph.match import View, array_of, held_values, input_of, producer, sole_reader, weight_recipe
from passes.weights.recipe import Recipe

LOSSLESS = ("Identity", "Cast", "Reshape", "Pad")


@dataclass(frozen=True)
class Found:
    """A constant: its name, its recipe, and the length to which zeros pad its last axis (0: none)."""

    name: str
    recipe: Recipe
    padded: int = 0


def constant_feeding(tensor: gs.Tensor) -> Found | None:
    """The constant that reaches `tensor` through Identity, Cast, Reshape and a Pad of the last axis; None for others.

    After a Pad the recipe keeps the unpadded shape, and a Reshape that follows the Pad is left to the caller.
    """
    node = producer(tensor)
    if node is None:
        recipe = weight_recipe(tensor)
        return None if recipe is None else Found(tensor.name, recipe)
    held = node.attrs.get("value") if node.op == "Constant" else None
    if held is not None and (recipe := weight_recipe(held)) is not None:
        return Found(tensor.name, recipe)
    found = constant_feeding(node.inputs[0]) if node.op in LOSSLESS else None
    if found is None or node.op == "Identity":
        return found
    if node.op == "Cast":
        return Found(found.name, found.recipe.cast(int(node.attrs["to"])), found.padded)
    if node.op == "Reshape":
        if found.padded:
            return found
        shape = reshaped(node, found.recipe.shape)
        return None if shape is None else Found(found.name, found.recipe.reshape(shape))
    return _padded(node, found)


def _padded(node: gs.Node, found: Found) -> Found | None:
    """The constant under zeros at the end of its last axis; None for any other padding."""
    pads, rank = constant_ints(node, 1), len(found.recipe.shape)
    value = array_of(node.inputs[2]) if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    plain = node.attrs.get("mode", "constant") in ("constant", b"constant") and len(node.inputs) < 4
    if pads is None or found.padded or not plain or len(pads) != 2 * rank or any(pads[:-1]) or pads[-1] < 0:
        return None
    if value is not None and float(value.astype("float32").reshape(())) != 0:
        return None
    return Found(found.name, found.recipe, found.recipe.shape[-1] + pads[-1] if pads[-1] else 0)


def relabelled(
    tensor: gs.Tensor, shape: tuple[int, ...], view: View
) -> tuple[gs.Tensor, tuple[int, ...], list[gs.Node]]:
    """What Reshape and Slice from the start make of a tensor that nothing else reads: result, its shape, the nodes."""
    nodes = list[gs.Node]()
    while (node := sole_reader(tensor, view)) is not None and node.inputs[0] is tensor:
        if node.op == "Reshape":
            reached = reshaped(node, shape)
        elif node.op == "Slice":
            reached = _sliced(node, shape)
        else:
            break
        if reached is None:
            break
        nodes.append(node)
        tensor, shape = node.outputs[0], reached
    return tensor, shape, nodes


def _sliced(node: gs.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of what a Slice from the start of its axes gives; None for any other Slice."""
    starts, ends, axes = (constant_ints(node, i) for i in (1, 2, 3))
    steps = constant_ints(node, 4) if len(node.inputs) > 4 else None
    if starts is None or ends is None or any(starts) or any(step != 1 for step in steps or ()):
        return None
    result = list(shape)
    for axis, end in zip(axes if axes is not None else range(len(ends)), ends, strict=True):
        result[axis] = min(end, shape[axis]) if end >= 0 else max(shape[axis] + end, 0)
    return tuple(result)


def constant_ints(node: gs.Node, index: int) -> list[int] | None:
    """The integers of a constant input; None when it is left out or computed."""
    tensor = input_of(node, index)
    array = None if tensor is None else held_values(tensor)
    return None if array is None else [int(value) for value in array.reshape(-1)]


def reshaped(node: gs.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a Reshape node makes of `shape`; None when its target is computed or does not fit."""
    return resolved(shape, constant_ints(node, 1), allowzero=bool(node.attrs.get("allowzero", 0)))


def resolved(
    shape: tuple[int, ...], target: list[int] | None, *, allowzero: bool = False
) -> tuple[int, ...] | None:
    """The shape that Reshape makes of `shape`; None when the target is not known or does not fit.

    In the target, 0 keeps a dimension (unless `allowzero`), and -1 is what is left.
    """
    if target is None:
        return None
    dims = [
        shape[i] if dim == 0 and not allowzero and i < len(shape) else dim for i, dim in enumerate(target)
    ]
    known = math.prod(dim for dim in dims if dim != -1)
    if -1 in dims and known:
        dims[dims.index(-1)] = math.prod(shape) // known
    return tuple(dims) if math.prod(dims) == math.prod(shape) and -1 not in dims else None
