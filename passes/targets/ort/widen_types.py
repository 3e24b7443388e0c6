"""widen-types: the same graph in a wider floating-point type, to run where the narrow one has no kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes.base import Pass, PassError, PassResult, register, walk
from passes.graph.edit import inline_values
from passes.graph.match import array_of
from passes.graph.types import float_type
from passes.weights.recipe import RecipeValues, dtype_of, recipe_of

# Attributes that hold an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "precision")


@register
@dataclass(frozen=True)
class WidenTypes(Pass):
    """Let everything of type `source` have type `to`: the twin that validates a bfloat16 graph on a CPU.

    1. Graph input, output or intermediate tensor of type `source` -> of type `to`.
    2. Constant of that type, inline or a recipe, or in an attribute -> cast (exact when `to` is wider).
    3. Attribute that names the type (`to` of Cast, `output_dtype` of DequantizeLinear ...) -> names `to`.

    Never: quantized types (INT8, FLOAT8E4M3FN, INT4, FLOAT4E2M1), which stay as stored. The twin rounds
    less than the original, so outputs differ by the rounding of `source`; that is the tolerance.
    """

    name: ClassVar[str] = "widen-types"
    tolerance: ClassVar[float] = 2e-2
    changes_types: ClassVar[bool] = True
    source: str = "bfloat16"
    to: str = "float32"

    def run(self, graph: gs.Graph) -> PassResult:
        """Change types in place; the graph keeps its nodes."""
        source, to = float_type(self.source), float_type(self.to)
        changed = 0
        for part in walk(graph):
            tensors = {id(t): t for t in (*part.inputs, *part.outputs, *part.tensors().values())}
            changed += sum(retype(tensor, source, to) for tensor in tensors.values())
            changed += sum(retype_attributes(node, source, to) for node in part.nodes)
        notes = (f"{changed} tensors and attributes from {self.source} to {self.to}",) if changed else ()
        return PassResult(changed, notes)


def retype(tensor: gs.Tensor, source: int, to: int) -> bool:
    """Change the type of one tensor; whether it had type `source`."""
    if dtype_of(tensor) != source:
        return False
    if isinstance(tensor, gs.Variable):
        tensor.dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to))
    elif (recipe := recipe_of(tensor)) is not None:
        tensor.values = RecipeValues(recipe.cast(to).to_tensor(tensor.name))
    else:
        array = array_of(tensor)
        if array is None:
            raise PassError(
                f"weight {tensor.name!r} is in an external file. Fix: load the model with passes.storage.load"
            )
        tensor.values = inline_values(
            tensor.name, array.astype(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(to)))
        )
    return True


def retype_attributes(node: gs.Node, source: int, to: int) -> int:
    """Change the types that the attributes of a node name or hold; how many."""
    changed = 0
    for key in _TYPE_ATTRIBUTES:
        value = node.attrs.get(key)
        if value is not None and not isinstance(value, gs.Tensor) and _as_type(value) == source:
            node.attrs[key] = to
            changed += 1
    held = [value for value in node.attrs.values() if isinstance(value, gs.Tensor)]
    return changed + sum(retype(tensor, source, to) for tensor in held)


def _as_type(value: object) -> int | None:
    """An element type in an attribute: ONNX's number, or a numpy type that a script put there."""
    return value if isinstance(value, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(value)))  # type: ignore[call-overload]
