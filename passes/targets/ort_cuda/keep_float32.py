"""keep-float32: vectors computed from weights stay float32 in the file, and are rounded when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.base import Pass, PassResult, Refusal, register, walk
from passes.graph.edit import Edit
from passes.weights.recipe import Recipe, bits_of, constant, dtype_of, recipe_of

_COMPUTED = "subtract_product"


@register
@dataclass(frozen=True)
class KeepFloat32(Pass):
    """Let a vector that fold-value-bias made be a float32 constant before a Cast to the type that it had.

        before: vector, computed in float32 and rounded to 16 bits        after: Cast(vector, not rounded)

    A session folds the Cast when it loads the model, to the same bits. But the model in float32 that validation runs
    gets the digits back that the rounded vector has lost: what is off there is the graph's fault, not rounding's.

    Declines when: what was computed is not a vector. Vectors of float32 are as wanted.
    """

    name: ClassVar[str] = "keep-float32"
    tolerance: ClassVar[float] = 1e-3
    """In float32 alone: by what the vectors had been rounded."""

    def run(self, graph: gs.Graph) -> PassResult:
        """Replace constants; the Casts come first in their graph."""
        edit, changed, refusals = Edit(graph), 0, list[Refusal]()
        for part in walk(graph):
            for tensor in list(part.tensors().values()):
                wide = self.match(tensor)
                if isinstance(wide, str):
                    refusals.append(Refusal(tensor.name, wide))
                elif wide is not None:
                    self.rewrite(tensor, wide, part.nodes[0], edit)
                    changed += 1
        edit.apply()
        return PassResult(changed, (f"{changed} vectors",) if changed else (), tuple(refusals))

    def match(self, tensor: gs.Tensor) -> Recipe | str | None:
        """The recipe of a vector in float32, if it was computed in that and rounded to 16 bits.

        Of joined vectors, all are widened when one was rounded.
        """
        recipe = recipe_of(tensor)
        if recipe is None or bits_of(recipe.dtype) != 16 or not tensor.outputs:
            return None
        ops = recipe.ops
        while ops and ops[-1].name == "reshape":
            ops = ops[:-1]
        size = math.prod(recipe.shape)
        flat = replace(recipe, ops=ops, shape=(size,))
        if size != max(recipe.shape, default=0):
            return "it was computed and rounded, but is not a vector" if _unrounded(flat) else None
        wide = [_unrounded(part) for part in flat.rows]
        if not any(wide):
            return None
        first, *others = (w or part.cast(TensorProto.FLOAT) for w, part in zip(wide, flat.rows, strict=True))
        return (first.append(others) if others else first).reshape(recipe.shape)

    def rewrite(self, tensor: gs.Constant, wide: Recipe, place: gs.Node, edit: Edit) -> None:
        """A Cast gives what `tensor` gave to all that read it."""
        name = edit.names.fresh(f"{tensor.name}/float32")
        rounded = gs.Variable(edit.names.fresh(f"{tensor.name}/rounded"), tensor.dtype, list(tensor.shape))
        edit.replace_uses(tensor, rounded)
        cast = gs.Node("Cast", f"{name}/Cast", {"to": dtype_of(tensor)}, [constant(name, wide)], [rounded])
        edit.at(place).nodes.append(cast)


def _unrounded(recipe: Recipe) -> Recipe | None:
    """Without the rounding that comes last; None where none does, or nothing was computed before it."""
    *before, last = (op.name for op in recipe.ops) if recipe.ops else ("",)
    if last != "cast" or _COMPUTED not in before:
        return None
    return replace(recipe, ops=recipe.ops[:-1], dtype=int(TensorProto.FLOAT))
