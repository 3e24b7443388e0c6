"""The tensors of a file -> its weights, and the layers that it holds quantized. No weight is read; scales alone are.

A tensor beside a weight that is not understood is an error: whoever drops a scale loses the model without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.stored import compressed, scaled
from diffc.models.stored.held import Decoded, Held
from diffc.models.stored.layer import Layer
from diffc.records import parse_record
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

SUFFIXES = (*scaled.SUFFIXES, *compressed.SUFFIXES)
"""Names of tensors beside a weight, as they follow the name of its layer and a dot."""
_F8 = (int(TensorProto.FLOAT8E4M3FN), int(TensorProto.FLOAT8E5M2))
_UNREAD = {
    "wscales": "nunchaku",
    "qzeros": "GPTQ or AWQ",
    "qweight": "nunchaku, GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "_data": "optimum-quanto",
}
"""Ends of names -> who writes them; the more telling ones first."""


@dataclass(frozen=True)
class Statement:
    """What a file or folder says of its quantization besides the tensors.

    `algorithm`: ModelOpt's quant_algo, empty where it is not told. `layers`: the format of each layer by its name
    (ComfyUI's `_quantization_metadata`). `comfyui`: its 4-bit codes have the upper half of a byte first, and scales of
    blocks lie in tiles; None where neither says so.
    """

    algorithm: str = ""
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    comfyui: bool | None = None


def decode(tensors: Mapping[str, Recipe], said: Statement, where: object) -> Decoded:
    """Weights by name, scales taken in; `where` is the file or folder, for messages.

    Raises UnsupportedError for a layout that diffc does not read, DiffcError for tensors that do not fit each other.
    """
    plain, layers = _grouped(tensors)
    said = _with_marker(plain, said)
    weights, held = dict(plain), dict[str, Held]()
    for name, own in layers.items():
        if compressed.is_idle(own):
            continue
        layer = Layer(
            name, own, plain.get(f"{name}.bias"), said.algorithm, _told(name, own, said), said.comfyui
        )
        found = _read(layer, where)
        if isinstance(found, Held):
            held[name] = found
            weights[f"{name}.weight"] = found.effective
        else:
            weights[f"{name}.weight"] = found
    return Decoded({name: _without_float8(recipe) for name, recipe in weights.items()}, held)


def _read(layer: Layer, where: object) -> Held | Recipe:
    try:
        if "weight" not in layer.own:
            raise DiffcError(
                f"{where}: {layer.name} has {', '.join(sorted(layer.own))} and no weight",
                fix="download the model again",
            )
        if any(key in compressed.SUFFIXES for key in layer.own):
            return compressed.read(layer)
        return scaled.read(layer)
    except ValueError as error:  # a PassError of a recipe that does not fit
        raise DiffcError(
            f"{where}: the tensors of {layer.name} do not fit each other: {error}",
            fix="download the file again",
        ) from error


def _grouped(tensors: Mapping[str, Recipe]) -> tuple[dict[str, Recipe], dict[str, dict[str, Recipe]]]:
    """Plain tensors, and those of quantized layers by the layer and what is after its name."""
    plain, layers = dict[str, Recipe](), dict[str, dict[str, Recipe]]()
    for key, recipe in tensors.items():
        suffix = next((s for s in SUFFIXES if key.endswith(f".{s}")), None)
        if suffix is None:
            plain[key] = recipe
        else:
            layers.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = recipe
    for key, recipe in tensors.items():
        name = key.removesuffix(".weight")
        if key.endswith(".weight") and (name in layers or _is_float8_matrix(recipe)):
            layers.setdefault(name, {})["weight"] = plain.pop(key)
    ends = {key.rpartition(".")[2]: key for key in reversed(plain)}
    for end, kind in _UNREAD.items():
        if end not in ends:
            continue
        strange = ends[end]
        raise UnsupportedError(
            f"the tensor {strange!r} is of {kind}, whose codes diffc does not read",
            fix="give the model in 16 bits, or quantized by ModelOpt or for ComfyUI",
        )
    return plain, layers


def _is_float8_matrix(recipe: Recipe) -> bool:
    return recipe.dtype in _F8 and len(recipe.shape) > 1


def _without_float8(recipe: Recipe) -> Recipe:
    """Biases and norms that a file has in 8 bits, in bfloat16, which holds every value of these types."""
    return recipe.cast(TensorProto.BFLOAT16) if recipe.dtype in _F8 else recipe


def _with_marker(plain: dict[str, Recipe], said: Statement) -> Statement:
    """ComfyUI's older marker, a tensor `scaled_fp8`: of two elements where products are not to run in FP8."""
    key = next((name for name in plain if name.rpartition(".")[2] == "scaled_fp8"), None)
    if key is None:
        return said
    marker = plain.pop(key)
    algorithm = scaled.OLD_COMFYUI_WIDE if marker.shape == (2,) else scaled.OLD_COMFYUI
    return Statement(algorithm, said.layers, True)


def _told(name: str, own: dict[str, Recipe], said: Statement) -> Mapping[str, Any]:
    """What is said of one layer: its `comfy_quant` tensor, a JSON text in bytes, or the file's list of layers."""
    if "comfy_quant" not in own:
        return said.layers.get(name, {})
    text = np.asarray(evaluate(own.pop("comfy_quant"))).tobytes().rstrip(b"\0")
    return parse_record(text, f"{name}.comfy_quant", fix="save the file again with ComfyUI")
