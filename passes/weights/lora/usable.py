"""What no adapter may have: factors that do not fit each other, whole numbers for weights, values that are NaN."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from passes.base import PassError
from passes.weights.evaluate import evaluate
from passes.weights.lora.file import AdapterFile
from passes.weights.recipe import Recipe

_FLOATS = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
)


def why_unusable(tensors: Mapping[str, Recipe]) -> str:
    """Why the tensors of one layer, by role, make no difference to a weight; empty when shapes and types allow one.

    Reads alpha and nothing else.
    """
    for role, recipe in tensors.items():
        if role != "alpha" and recipe.dtype not in _FLOATS:
            kind = TensorProto.DataType.Name(recipe.dtype)
            return f"its values are of type {kind}, with nothing that says what they are multiplied with"
    if "alpha" in tensors:
        alpha = np.asarray(evaluate(tensors["alpha"])).astype(np.float64).reshape(-1)
        if alpha.size != 1:
            return f"its alpha is {', '.join(f'{n:g}' for n in alpha[:4])}, and one number is expected"
    if "up" in tensors and "down" in tensors:
        return _why_no_product(tensors["up"], tensors["down"], tensors.get("mid"))
    return ""


def _why_no_product(up: Recipe, down: Recipe, core: Recipe | None) -> str:
    if len(up.shape) < 2 or len(down.shape) < 2:
        return f"its factors have shapes {list(down.shape)} and {list(up.shape)}, which are not matrices"
    if core is not None:
        fits = core.shape[:2] == (up.shape[1], down.shape[0])
        return "" if fits else f"its core of shape {list(core.shape)} does not fit its factors"
    if up.shape[1] != down.shape[0]:
        return f"its factors do not fit each other: their ranks are {down.shape[0]} and {up.shape[1]}"
    return "" if down.shape[0] else "its rank is 0: there is nothing in it"


def check_values(file: AdapterFile) -> None:
    """Read all values of `file` once. Raises PassError when one is not finite, or the file is cut off."""
    for recipe in file.tensors.values():
        try:
            evaluate(recipe)
        except PassError as error:
            said = str(error)
            raise PassError(said if "Fix:" in said else f"{said}. Fix: download it again") from error
