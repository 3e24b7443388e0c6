"""The tensors of a quantized layer as other tools name, pack and lay them out."""

from __future__ import annotations

import json

import numpy as np
from onnx import TensorProto

from diffc.models.stored.held import Held
from passes.weights.moves import split_at_dequantize
from passes.weights.recipe import Recipe
from passes.weights.stored import pack, pack_rows, swizzle

FLOAT = int(TensorProto.FLOAT)
COMFYUI = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}
"""ComfyUI's names of formats."""


def parts_of(layer: Held) -> tuple[Recipe, Recipe]:
    """Codes and scales of a layer's weight."""
    found = split_at_dequantize(layer.weight)
    assert found is not None  # a held weight ends with its dequantization
    return found[0], Recipe.from_json(found[1].args["scale"])


def modelopt_tensors(name: str, layer: Held, dtype: int) -> dict[str, Recipe]:
    """As ModelOpt's `export_hf_checkpoint` writes a layer: see `diffc.models.stored.scaled`."""
    codes, scale = parts_of(layer)
    made = _weight(codes, scale, layer.kind)
    if layer.input is not None and layer.input.scale is not None:
        made["input_scale"] = layer.input.scale.cast(FLOAT)
    if layer.pre_quant_scale is not None:
        made["pre_quant_scale"] = layer.pre_quant_scale.cast(dtype)
    if layer.low_rank is not None:
        made["svdquant_lora_a"], made["svdquant_lora_b"] = (part.cast(dtype) for part in layer.low_rank)
    return {f"{name}.{key}": recipe for key, recipe in made.items()}


def _weight(codes: Recipe, scale: Recipe, kind: str) -> dict[str, Recipe]:
    if kind == "nvfp4":
        blocks, tensor = _levels(scale)
        return {"weight": pack(codes), "weight_scale": blocks, "weight_scale_2": tensor}
    if kind == "mxfp8":
        return {"weight": codes, "weight_scale": _powers(scale)}
    if kind == "int4":
        return {"weight": pack_rows(codes), "weight_scale": scale.cast(FLOAT)}
    return {"weight": codes, "weight_scale": scale.cast(FLOAT)}


def comfyui_tensors(name: str, layer: Held) -> dict[str, Recipe] | None:
    """As ComfyUI's `comfy_quant` has a layer; None where it has no such layer."""
    if layer.kind not in COMFYUI or layer.low_rank is not None or len(layer.weight.shape) != 2:
        return None
    codes, scale = parts_of(layer)
    if layer.kind == "nvfp4":
        blocks, tensor = _levels(scale)
        if codes.shape[0] % 16 or codes.shape[1] % 16:
            return None
        made = {
            "weight": pack(codes, high_first=True),
            "weight_scale": swizzle(blocks),
            "weight_scale_2": tensor,
        }
    elif layer.kind == "mxfp8":
        made = {"weight": codes, "weight_scale": swizzle(_powers(scale))}
    else:
        made = {"weight": codes, "weight_scale": scale.cast(FLOAT)}
    if layer.input is not None and layer.input.scale is not None:
        made["input_scale"] = layer.input.scale.cast(FLOAT)
    if layer.pre_quant_scale is not None:
        made["pre_quant_scale"] = layer.pre_quant_scale.cast(FLOAT)
    text = json.dumps({"format": COMFYUI[layer.kind]}).encode()
    made["comfy_quant"] = Recipe.of_array(np.frombuffer(text, np.uint8))
    return {f"{name}.{key}": recipe for key, recipe in made.items()}


def _levels(scale: Recipe) -> tuple[Recipe, Recipe]:
    """E4M3 scales of blocks, and that of the tensor, of NVFP4."""
    found = split_at_dequantize(scale)
    assert found is not None
    tensor = Recipe.from_json(found[1].args["scale"]).cast(FLOAT)
    return found[0], tensor


def _powers(scale: Recipe) -> Recipe:
    """The exponents of MXFP8 before they are powers of two, UINT8."""
    return Recipe(scale.source, scale.ops[:-1], int(TensorProto.UINT8), scale.shape)
