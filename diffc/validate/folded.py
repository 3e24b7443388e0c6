"""Weights that a pass quantized, held against their originals: no value may be off by more than half a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from passes import PassCheckError
from passes.storage import initializers
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

Array = npt.NDArray[Any]

# type -> (least and largest value, half a step relative to the value, half a step near zero). E4M3 has 3 mantissa
# bits: steps of 2^-3 of the leading power of two, so at most 2^-4 of the value, and 2^-9 for subnormals.
_STEPS = {
    TensorProto.INT8: (-128.0, 127.0, 0.0, 0.5),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0, 2.0**-4, 2.0**-10),
}


def check_folded_weights(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Check every initializer that was quantized between the two models; returns how many there were.

    The bound is computed from the definition of the types, not from the code that rounds. Raises
    PassCheckError naming the weight.
    """
    known = {t.name for t in initializers(before)}
    count = 0
    for tensor in initializers(after):
        recipe = Recipe.of_tensor(tensor)
        if recipe is None or tensor.name in known or recipe.dtype not in _STEPS:
            continue
        position = next((i for i, op in enumerate(recipe.ops) if op.name == "quantize"), None)
        if position is not None:
            count += 1
            _check(tensor.name, recipe, position)
    return count


def _check(name: str, recipe: Recipe, position: int) -> None:
    args = recipe.ops[position].args
    if args["block_size"]:
        return  # the DequantizeLinear of blocks is checked through the model's outputs
    shape = recipe.source.shape
    for op in recipe.ops[:position]:
        shape = tuple(op.args["shape"]) if op.name == "reshape" else shape
        shape = tuple(shape[i] for i in op.args["perm"]) if op.name == "transpose" else shape
    original = evaluate(Recipe(recipe.source, recipe.ops[:position], recipe.source.dtype, shape)).astype(
        np.float64
    )
    quantized = evaluate(Recipe(recipe.source, recipe.ops[: position + 1], args["to"], shape)).astype(
        np.float64
    )
    scale = evaluate(Recipe.from_json(args["scale"])).astype(np.float64)
    if args["axis"] is not None and scale.ndim:
        scale = scale.reshape([-1 if i == args["axis"] % original.ndim else 1 for i in range(original.ndim)])
    least, largest, relative, absolute = _STEPS[args["to"]]
    wanted = np.clip(original / scale, least, largest)
    # The slack is the rounding of the scale to 16 bits, and of float32 arithmetic.
    allowed = np.maximum(np.abs(wanted) * relative, absolute) + np.abs(wanted) * 2.0**-8
    worst = float(np.max(np.abs(quantized - wanted) - allowed))
    if not worst <= 0:
        raise PassCheckError(
            f"weight {name!r} was quantized wrongly: a value is off by {worst:.3g} steps too many"
        )
