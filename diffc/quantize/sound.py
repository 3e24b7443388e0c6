"""Whether the scales of a checkpoint can be right: finite, above zero, and of the shapes that their layers ask for.

A scale of 0 makes every weight of its layer the largest number of the format. The torch reference is quantized with
the same scale, so the comparison of both sides cannot find it out: such a value has to be refused where it comes in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from diffc.errors import DiffcError
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.kinds import Settings, block_size_of, kind_of
from diffc.quantize.state import SCALING, Amax, Scaling

_FIX = "calibrate again: the scales of this checkpoint were changed, or were never right"
_FACTOR, *_BRANCH = SCALING


def check_values(where: object, amax: Mapping[str, Amax], scaling: Scaling) -> None:
    """Raise DiffcError that names the first array of a checkpoint that holds a value which no scale can have.

    amax and channel factors are finite and above zero, the two matrices of a branch finite; all are float32.
    """
    arrays = {f"{name}.amax": array for name, array in amax.items()} | dict(scaling)
    for name, array in arrays.items():
        wrong = _wrong(array, positive=name.rpartition(".")[2] not in _BRANCH)
        if wrong:
            raise DiffcError(f"{where}: {name} {wrong}", fix=_FIX)
    for name in scaling:
        path, _, kind = name.rpartition(".")
        if kind in _BRANCH and any(f"{path}.{half}" not in scaling for half in _BRANCH):
            raise DiffcError(f"{where}: {path} has one half of a low-rank branch", fix=_FIX)


def _wrong(array: npt.NDArray[np.float32], *, positive: bool) -> str:
    if array.dtype != np.float32:
        return f"is {array.dtype}, and scales are float32"
    if not array.size:
        return "is empty"
    if not np.isfinite(array).all():
        return "holds NaN or infinity"
    if positive and not (array > 0).all():
        return f"holds {float(array.min()):g}, and every one of its values must be above zero"
    return ""


def check_settings(where: object, settings: Mapping[str, Settings]) -> None:
    """Raise DiffcError for settings of a quantizer whose blocks or axis cannot be."""
    for name, own in settings.items():
        blocks = own["block_sizes"] or {}
        size = blocks.get("-1", blocks.get(-1)) if blocks else 1
        dynamic_without = blocks.get("type") == "dynamic" and not _is_pair(blocks.get("scale_bits"))
        if not isinstance(size, int) or size < 1 or dynamic_without:
            raise DiffcError(f"{where}: the blocks {dict(blocks)} of {name} cannot be", fix=_FIX)


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int) for n in value)


def check_shapes(
    where: object,
    settings: Mapping[str, Settings],
    amax: Mapping[str, Amax],
    scaling: Scaling,
    weights: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise DiffcError that names an array of another shape than its layer asks for.

    `weights` are the shapes of the layers' weights by the layer's path; attention has none.
    """
    for name, array in amax.items():
        own, shape = settings[name], weights.get(layer_of(name))
        sizes = _sizes(own, shape if role_of(name) == "weight_quantizer" else None)
        if array.size not in sizes:
            told = (
                f"{name}.amax has {array.size} values, and this model asks for {' or '.join(map(str, sizes))}"
            )
            raise DiffcError(f"{where}: {told}", fix="give the checkpoint of this model")
    for name, array in scaling.items():
        path, _, kind = name.rpartition(".")
        shape = weights.get(path.rpartition(".")[0], ())
        if not _fits(kind, array.shape, shape, scaling, path):
            told = f"{name} has shape {list(array.shape)}, and the weight has {list(shape)}"
            raise DiffcError(f"{where}: {told}", fix="give the checkpoint of this model")


def _sizes(settings: Settings, weight: tuple[int, ...] | None) -> list[int]:
    """How many values an amax may have."""
    if weight is None:
        return [1]
    block, axis = block_size_of(settings), settings["axis"]
    if block is not None and kind_of(settings).blocks == "static":
        return [math.prod(weight) // block]
    axes = [axis] if isinstance(axis, int) else list(axis or ())
    return [1, *(weight[a] for a in axes if -len(weight) <= a < len(weight))]


def _fits(kind: str, shape: tuple[int, ...], weight: tuple[int, ...], scaling: Scaling, path: str) -> bool:
    if len(weight) != 2:
        return False
    if kind == _FACTOR:
        return math.prod(shape) == weight[1] and shape[-1:] == weight[1:]
    rank = scaling[f"{path}.{_BRANCH[0]}"].shape[:1]
    return shape == ((*rank, weight[1]) if kind == _BRANCH[0] else (weight[0], *rank))
