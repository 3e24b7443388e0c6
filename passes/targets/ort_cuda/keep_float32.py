"""keep-float32: vectors computed from weights stay float32 in the file, and are rounded when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, register, walk
from passes.graph.edit import Names, replace_uses
from passes.graph.match import weight_recipe
from passes.weights.recipe import Recipe, bits_of, constant, dtype_of

_COMPUTED = "subtract_product"


@register
@dataclass(frozen=True)
class KeepFloat32(Pass):
    """Let a vector that fold-value-bias made be a float32 constant behind a Cast to the type that it had.

    A session folds the Cast when it loads the model, to the same bits. But the model in float32 that validation runs
    gets the digits back that the rounded vector has lost: what is off there is the graph's fault, not rounding's.
    """

    name: ClassVar[str] = "keep-float32"
    tolerance: ClassVar[float] = 1e-3
    """In float32 alone: by what the vectors had been rounded."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace constants; the Casts come first in their graph."""
        names = Names(graph)
        changed = 0
        for part in walk(graph):
            casts = []
            for tensor in list(part.tensors().values()):
                recipe = _widened(weight_recipe(tensor)) if isinstance(tensor, gs.Constant) else None
                if recipe is not None and tensor.outputs:
                    casts.append(_cast(tensor, recipe, names))
            part.nodes = [*casts, *part.nodes]
            changed += len(casts)
        return PassResult(changed, (f"{changed} vectors",) if changed else ())


def _cast(tensor: gs.Constant, wide: Recipe, names: Names) -> gs.Node:
    """The node that gives what `tensor` gave to all that read it."""
    name = names.fresh(f"{tensor.name}/float32")
    rounded = gs.Variable(names.fresh(f"{tensor.name}/rounded"), dtype=tensor.dtype, shape=list(tensor.shape))
    replace_uses(tensor, rounded)
    return gs.Node("Cast", f"{name}/Cast", {"to": dtype_of(tensor)}, [constant(name, wide)], [rounded])


def _widened(recipe: Recipe | None) -> Recipe | None:
    """The recipe of a vector in float32, if it was computed in that and rounded to 16 bits; None for others.

    Of joined vectors, all are widened when one was rounded.
    """
    size = 0 if recipe is None else math.prod(recipe.shape)
    if recipe is None or bits_of(recipe.dtype) != 16 or size != max(recipe.shape, default=0):
        return None
    ops = recipe.ops
    while ops and ops[-1].name == "reshape":
        ops = ops[:-1]
    parts = replace(recipe, ops=ops, shape=(size,)).rows
    wide = [_unrounded(part) for part in parts]
    if not any(wide):
        return None
    first, *others = (w or part.cast(TensorProto.FLOAT) for w, part in zip(wide, parts, strict=True))
    return (first.append(others) if others else first).reshape(recipe.shape)


def _unrounded(recipe: Recipe) -> Recipe | None:
    """Without the rounding that comes last; None where none does, or nothing was computed before it."""
    *before, last = (op.name for op in recipe.ops) if recipe.ops else ("",)
    if last != "cast" or _COMPUTED not in before:
        return None
    return replace(recipe, ops=recipe.ops[:-1], dtype=int(TensorProto.FLOAT))
