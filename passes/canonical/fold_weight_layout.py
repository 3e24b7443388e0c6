"""fold-weight-layout: a weight is stored as its readers want it, so nothing moves it at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Names, drop_nodes, inline, replace_uses
from passes.graph.match import array_of, output_ids
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
        work = _Work(Names(graph), output_ids(graph))
        for part in walk(graph):
            for tensor in part.tensors().values():
                while recipe_of(tensor) is not None and work.visit(tensor):
                    pass
        drop_nodes(graph, work.dead)
        notes = (f"{len(work.dead)} operations moved into weights",) if work.dead else ()
        return PassResult(len(work.dead), notes, tuple(work.refusals))


class _CannotError(Exception):
    """Why a weight must stay as it is."""


@dataclass
class _Work:
    """One sweep: fresh names, what to drop, what was refused."""

    names: Names
    outputs: set[int]
    dead: set[int] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)

    def visit(self, weight: gs.Constant) -> bool:
        """Fold what all readers of `weight` have in common; whether anything was folded."""
        readers = self._readers(weight)
        scales = [node for node in readers if node.op == "DequantizeLinear" and node.inputs[0] is weight]
        if scales and len(scales) == len(readers):
            movers = [node for scale in scales for node in self._readers(scale.outputs[0])]
        else:
            movers, scales = readers, []
        first = next((node for node in movers if node.op in _LAYOUTS), None)
        if first is None:
            return False
        try:
            self._fold(weight, scales, movers)
        except _CannotError as reason:
            self.refusals.append(Refusal(first.name, f"weight {weight.name!r}: {reason}"))
            return False
        return True

    def _readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """Nodes that read a tensor and are not yet folded away."""
        return [node for node in tensor.outputs if id(node) not in self.dead]

    def _fold(self, weight: gs.Constant, scales: Sequence[gs.Node], movers: Sequence[gs.Node]) -> None:
        recipe = _recipe(weight)
        layouts = [_layout(node, recipe.shape) for node in movers]
        if any(layout != layouts[0] for layout in layouts):
            raise _CannotError("its readers want different layouts, and it would be stored twice")
        if any(id(node.outputs[0]) in self.outputs for node in (*scales, *movers)):
            raise _CannotError("the moved tensor is a graph output")
        op, argument = layouts[0]
        if op == "cast" and not scales and bits_of(argument) > bits_of(recipe.dtype):
            raise _CannotError("the Cast widens it, and it would be stored in more bytes")
        new = getattr(recipe, op)(argument) if op != "identity" else recipe
        axes = [_moved_axis(node, op, argument, recipe.shape) for node in scales]
        for node, axis in zip(scales, axes, strict=True):  # nothing has changed before the last refusal
            for tensor in node.inputs[1:] if axis is not None else ():
                if recipe_of(tensor) is None and array_of(tensor) is None:
                    raise _CannotError(f"its scale {tensor.name!r} is not constant")
        for node, axis in zip(scales, axes, strict=True):
            self._move_scale(node, axis, op, argument, new.shape)
        weight.values = RecipeValues(new.to_tensor(weight.name))
        for node in movers:
            replace_uses(node.outputs[0], node.inputs[0])
            self.dead.add(id(node))

    def _move_scale(
        self, node: gs.Node, axis: int | None, op: str, argument: Any, shape: tuple[int, ...]
    ) -> None:
        """Give a DequantizeLinear its new axis, its block scales in the new layout, its new output shape."""
        node.outputs[0].shape = list(shape)
        if axis is None:
            return
        node.attrs["axis"] = axis
        for index in range(1, len(node.inputs)):
            tensor = node.inputs[index]
            if op == "transpose" and len(tensor.shape) == len(shape) > 1:
                node.inputs[index] = self._transposed(tensor, argument)

    def _transposed(self, tensor: gs.Constant, perm: tuple[int, ...]) -> gs.Constant:
        name, recipe = self.names.fresh(f"{tensor.name}_t"), recipe_of(tensor)
        if recipe is not None:
            return constant(name, recipe.transpose(perm))
        array = array_of(tensor)
        if array is None:
            raise _CannotError(f"its scale {tensor.name!r} is not constant")
        return inline(name, array.transpose(perm))


def _recipe(weight: gs.Constant) -> Recipe:
    recipe = recipe_of(weight)
    if recipe is None:
        raise _CannotError("it has no recipe")
    return recipe


def _layout(node: gs.Node, shape: tuple[int, ...]) -> tuple[str, Any]:
    """What a node does to the weight, as a method of `Recipe` and its argument. Raises _CannotError."""
    if node.op == "Transpose":
        return "transpose", tuple(node.attrs.get("perm", range(len(shape))[::-1]))
    if node.op == "Cast":
        return "cast", int(node.attrs["to"])
    if node.op == "Identity":
        return "identity", None
    if node.op != "Reshape":
        raise _CannotError("its readers want different layouts, and it would be stored twice")
    target = array_of(node.inputs[1])
    if target is None:
        raise _CannotError(f"the shape of Reshape node {node.name!r} is not constant")
    return "reshape", _resolved(target.tolist(), shape, bool(node.attrs.get("allowzero", 0)))


def _resolved(target: Sequence[int], shape: tuple[int, ...], allowzero: bool) -> tuple[int, ...]:
    """A Reshape target with 0 (keep) and -1 (the rest) filled in."""
    dims = [shape[i] if dim == 0 and not allowzero else dim for i, dim in enumerate(target)]
    known = math.prod(dim for dim in dims if dim != -1)
    return tuple(math.prod(shape) // known if dim == -1 else dim for dim in dims)


def _moved_axis(node: gs.Node, op: str, argument: Any, shape: tuple[int, ...]) -> int | None:
    """The axis of a DequantizeLinear after the move; None when it is per tensor. Raises _CannotError."""
    if op == "cast":
        raise _CannotError("a Cast after DequantizeLinear rounds differently")
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
    raise _CannotError("a Reshape mixes its quantized axis with another")
