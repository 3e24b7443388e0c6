"""The quantized layers of a calibrated model: codes and scales as recipes, the same bytes that a compile stores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from diffc.frontend.quantizers import describe
from diffc.frontend.recipes import scaled_weight
from diffc.models.sources.source import ModelSource
from diffc.models.stored.held import Held, HeldInput
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.kinds import kind_of
from passes.weights.recipe import Recipe
from passes.weights.sources import keep
from passes.weights.stored import power_of_two

FLOAT = int(TensorProto.FLOAT)
DTYPES = {
    "float32": FLOAT,
    "float16": int(TensorProto.FLOAT16),
    "bfloat16": int(TensorProto.BFLOAT16),
}
_STORED = {"fp8": int(TensorProto.FLOAT8E4M3FN), "int8": int(TensorProto.INT8), "int4": int(TensorProto.INT4)}


def calibrated_layers(source: ModelSource, checkpoint: Checkpoint, dtype: str) -> dict[str, Held]:
    """Every layer whose weight the checkpoint quantizes, by module path, for weights in the type `dtype`.

    A weight that goes through two quantizers (w4a8) is what the first one stores.
    """
    if not checkpoint.scales_weights:
        return dict(source.held)
    found = {}
    for path in checkpoint.settings:
        if role_of(path) == "weight_quantizer" and not path.endswith(".1"):
            found[layer_of(path)] = _held(source, checkpoint, path, DTYPES[dtype])
    return found


def _held(source: ModelSource, checkpoint: Checkpoint, path: str, dtype: int) -> Held:
    name, settings = layer_of(path), checkpoint.settings[path]
    key = f"{name}.weight"
    carried = checkpoint.weights.get(key)
    weight = carried or scaled_weight(source.weights[key].cast(dtype), name, checkpoint)
    amax = checkpoint.amax.get(path)
    traced = describe(settings, 0 if amax is None else amax.size, weight.shape)
    kind = traced.kind
    if amax is None:
        values, powers = weight.mxfp8_values(traced.block_size), weight.mxfp8_scales(traced.block_size)
        stored = values.dequantize(power_of_two(powers), len(weight.shape) - 1, traced.block_size)
    elif kind.dynamic:
        tensor = kind.scale_recipe(amax.astype(np.float32).reshape(()))
        way = {"four_six": kind.name != kind.codes}
        values, scales = weight.nvfp4_values(tensor, **way), weight.nvfp4_scales(tensor, **way)
        stored = values.dequantize(scales.dequantize(tensor), len(weight.shape) - 1, traced.block_size)
    else:
        scale = kind.scale_recipe(amax.astype(np.float32).reshape(traced.shape or ()))
        axis = len(weight.shape) - 1 if traced.block_size else traced.axis
        codes = weight.quantize(scale.cast(dtype), _STORED[kind.name], axis, traced.block_size)
        stored = codes.dequantize(scale, axis, traced.block_size)
    factor = checkpoint.scaling.get(f"{name}.input_quantizer.pre_quant_scale")
    branch = [checkpoint.scaling.get(f"{name}.weight_quantizer.svdquant_lora_{side}") for side in "ab"]
    low_rank = None if branch[0] is None or branch[1] is None else (keep(branch[0]), keep(branch[1]))
    return Held(
        kind.codes, stored, _input(checkpoint, name), None if factor is None else keep(factor), low_rank
    )


def _input(checkpoint: Checkpoint, name: str) -> HeldInput | None:
    path = f"{name}.input_quantizer"
    if path not in checkpoint.settings:
        return None
    kind, amax = kind_of(checkpoint.settings[path]), checkpoint.amax.get(path)
    return HeldInput(
        kind.name, None if amax is None else kind.scale_recipe(amax.astype(np.float32).reshape(()))
    )


def plain_tensors(
    source: ModelSource, checkpoint: Checkpoint, held: Mapping[str, Held], dtype: str
) -> dict[str, Recipe]:
    """Every other tensor of the backbone, in the type `dtype`."""
    weights = {**source.weights, **checkpoint.weights}
    quantized = {f"{name}.weight" for name in held}
    return {key: recipe.cast(DTYPES[dtype]) for key, recipe in weights.items() if key not in quantized}


def unsaid(checkpoint: Checkpoint) -> list[str]:
    """The attention modules that the checkpoint quantizes: no layout of others has a place for these."""
    paths = [path for path in checkpoint.settings if "bmm" in role_of(path)]
    return list(dict.fromkeys(layer_of(path) for path in paths))
