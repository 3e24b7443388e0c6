"""Layers of codes and `weight_scale`: ModelOpt's exports, ComfyUI's files, Black Forest Labs' releases.

| kind  | weight                | weight_scale                        | others                       |
|-------|-----------------------|-------------------------------------|------------------------------|
| fp8   | E4M3 [N, K]           | F32 () or [N]                       | input_scale F32 ()           |
| int8  | I8 [N, K]             | F32 () or [N]                       | input_scale                  |
| int4  | U8 [N/2, K]           | F32 [N, K/128]                      | pre_quant_scale [K]          |
| nvfp4 | U8 [N, K/2]           | E4M3 [N, K/16], ComfyUI: in tiles   | weight_scale_2, input_scale  |
| mxfp8 | E4M3 [N, K]           | U8 or E8M0 [N, K/32], likewise      |                              |

A weight is code * weight_scale (* weight_scale_2). ComfyUI's older files say `scale_weight` and `scale_input`.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from diffc.models.stored.held import Held, HeldInput
from diffc.models.stored.layer import E4M3, FLOAT, Layer
from passes.weights.moves import rows
from passes.weights.recipe import Recipe
from passes.weights.stored import bits_as, power_of_two, unpack, unpack_rows, unswizzle

SUFFIXES = (
    "scale_weight",
    "scale_input",
    "weight_scale_2",
    "weight_scale",
    "input_scale",
    "pre_quant_scale",
    "comfy_quant",
    "svdquant_lora_a",
    "svdquant_lora_b",
)
OLD_COMFYUI, OLD_COMFYUI_WIDE = "scaled_fp8", "scaled_fp8, computed in 16 bits"
_U8, _I8 = int(TensorProto.UINT8), int(TensorProto.INT8)
_E2M1, _INT4 = int(TensorProto.FLOAT4E2M1), int(TensorProto.INT4)
_E5M2, _E8M0 = int(TensorProto.FLOAT8E5M2), int(TensorProto.FLOAT8E8M0)
_ROTATED = ("convrot", "convrot_w4a4", "asym_w4a8_int8", "awq_w4a16")


def read(layer: Layer) -> Held | Recipe:
    """The layer as it is held; a plain weight where no target has its kind of codes.

    Raises UnsupportedError for codes that are rotated or have zero points.
    """
    told = str(layer.told.get("format", ""))
    if any(word in told or layer.told.get(word) for word in _ROTATED):
        raise layer.refuse(
            f"as {told or 'rotated blocks'} (rotated inputs, zero points or a table of values)"
        )
    codes = bits_as(layer.weight, E4M3) if told.startswith("float8_e4m3") else layer.weight
    codes = bits_as(layer.weight, _E5M2) if told.startswith("float8_e5m2") else codes
    scale = layer.own.get("weight_scale", layer.own.get("scale_weight"))
    if codes.dtype == E4M3:
        return _float8(layer, codes, scale)
    if codes.dtype == _E5M2:  # no builder has it: plain values
        return _times(codes, scale)
    if codes.dtype == _I8:
        return _int8(layer, codes, scale)
    if codes.dtype == _U8 and scale is not None:
        return _four_bits(layer, codes, scale, told)
    if scale is None and not any(
        key in layer.own for key in ("weight_scale_2", "input_scale", "scale_input")
    ):
        return layer.weight
    raise layer.refuse(f"in a way that its tensors do not tell ({', '.join(sorted(layer.own))})")


def _float8(layer: Layer, codes: Recipe, scale: Recipe | None) -> Held | Recipe:
    if scale is not None and (scale.dtype in (_U8, _E8M0) or layer.told.get("format") == "mxfp8"):
        return _mxfp8(layer, codes, scale)
    if scale is not None and len(scale.shape) == 2 and 1 < scale.shape[1] < codes.shape[1]:
        return _times(codes, scale)
    weight, static = _per_row(codes, scale), _static(layer, "fp8")
    return Held("fp8", weight, static, layer.own.get("pre_quant_scale"), _branch(layer))


def _static(layer: Layer, kind: str) -> HeldInput | None:
    """An input with one scale for the tensor. ComfyUI's older files write 1 where there is none."""
    if layer.algorithm == OLD_COMFYUI_WIDE or layer.told.get("full_precision_matrix_mult"):
        return None
    if "input_scale" in layer.own:
        return HeldInput(kind, layer.scalar("input_scale"))
    if layer.number("scale_input") in (None, 1.0):
        return None
    return HeldInput(kind, layer.scalar("scale_input"))


def _per_row(codes: Recipe, scale: Recipe | None) -> Recipe:
    """code * scale, the scale of the tensor or of each row; 1 where there is none."""
    if scale is None:
        return codes.dequantize(_ONE)
    scale, size = scale.cast(FLOAT), _size(scale)
    if size == 1:
        return codes.dequantize(scale.reshape(()) if scale.shape else scale)
    if size != codes.shape[0]:
        raise ValueError(f"{size} scales for {codes.shape[0]} rows")
    return codes.dequantize(scale.reshape((size,)) if len(scale.shape) > 1 else scale, axis=0)


def _times(codes: Recipe, scale: Recipe | None) -> Recipe:
    """The plain weight, float32, of codes whose scale is that of the tensor, a row, or a block of rows and columns."""
    weight = codes.cast(FLOAT)
    if scale is None:
        return codes.cast(TensorProto.BFLOAT16)
    scale = scale.cast(FLOAT)
    if len(scale.shape) < 2 or scale.shape[1] == 1:
        return weight.multiply(scale.reshape((_size(scale), 1)))
    height, width = (-(-n // m) for n, m in zip(codes.shape, scale.shape, strict=True))
    wide = scale.spread_blocks(width, codes.shape[1]).transpose((1, 0))
    return weight.multiply(wide.spread_blocks(height, codes.shape[0]).transpose((1, 0)))


def _size(scale: Recipe) -> int:
    return math.prod(scale.shape)


def _int8(layer: Layer, codes: Recipe, scale: Recipe | None) -> Held | Recipe:
    if scale is None:
        raise layer.refuse("to 8-bit integers without weight_scale")
    if len(scale.shape) == 2 and scale.shape[1] > 1:
        return _times(codes, scale)
    return Held("int8", _per_row(codes, scale), _static(layer, "int8"), layer.own.get("pre_quant_scale"))


def _four_bits(layer: Layer, codes: Recipe, scale: Recipe, told: str) -> Held:
    if told == "mxfp8":
        return _mxfp8(layer, bits_as(codes, E4M3), scale)
    if "W4A" in layer.algorithm:
        return _int4(layer, codes, scale)
    if "weight_scale_2" in layer.own or told == "nvfp4":
        return _nvfp4(layer, codes, scale)
    raise layer.refuse(f"to 4 bits as {told or layer.algorithm or 'nothing says what'}")


def _int4(layer: Layer, codes: Recipe, scale: Recipe) -> Held:
    """ModelOpt's AWQ: two rows to a byte. weight_scale_2 is that of the FP8 stage, not a factor."""
    values = unpack_rows(codes, _INT4)
    block = values.shape[1] // scale.shape[1]
    weight = values.dequantize(scale.cast(FLOAT), 1, block)
    static = HeldInput("fp8", layer.scalar("input_scale")) if "input_scale" in layer.own else None
    return Held("int4", weight, static, layer.own.get("pre_quant_scale"))


def _nvfp4(layer: Layer, codes: Recipe, scale: Recipe) -> Held:
    tiled = _is_tiled(layer, codes, scale, 8)
    values = unpack(codes, _E2M1, high_first=tiled)
    scales = _blocks(bits_as(scale, E4M3), values, 16, tiled)
    tensor = layer.scalar("weight_scale_2") or _ONE
    values, scales = _cut(layer, values, scales)
    weight = values.dequantize(scales.dequantize(tensor), 1, 16)
    dynamic = HeldInput("nvfp4", layer.scalar("input_scale")) if "input_scale" in layer.own else None
    return Held("nvfp4", weight, dynamic, layer.own.get("pre_quant_scale"), _branch(layer))


def _mxfp8(layer: Layer, codes: Recipe, scale: Recipe) -> Held:
    tiled = _is_tiled(layer, codes, scale, 32)
    scales = _blocks(bits_as(scale, _U8), codes, 32, tiled)
    values, scales = _cut(layer, codes, scales)
    return Held("mxfp8", values.dequantize(power_of_two(scales), 1, 32), HeldInput("mxfp8"))


def _is_tiled(layer: Layer, codes: Recipe, scale: Recipe, width: int) -> bool:
    """Whether a layer is laid out as ComfyUI's: it says so, or its scales are padded to whole tiles.

    `width`: columns of `codes` that share a scale. Raises UnsupportedError where neither tells.
    """
    flat = (codes.shape[0], codes.shape[1] // width)
    if layer.told.get("format") or layer.comfyui is not None:
        return bool(layer.told.get("format")) or bool(layer.comfyui)
    if scale.shape != flat:
        return True
    if flat[0] % 128 or flat[1] % 4:
        return False
    raise layer.refuse(
        "in blocks, and nothing says whether as ComfyUI or as ModelOpt stores them (both have these shapes)",
        fix="give ModelOpt's folder with its config.json, or a file with ComfyUI's quantization metadata",
    )


def _blocks(scale: Recipe, values: Recipe, size: int, tiled: bool) -> Recipe:
    """Block scales in plain order, one for `size` elements of a row."""
    return unswizzle(scale, values.shape[0], values.shape[1] // size) if tiled else scale


def _cut(layer: Layer, values: Recipe, scales: Recipe) -> tuple[Recipe, Recipe]:
    """Without the rows that pad a weight to a multiple of 16 or 32: those that its bias does not have."""
    count = values.shape[0] if layer.bias is None else layer.bias.shape[0]
    return (values, scales) if count >= values.shape[0] else (rows(values, 0, count), rows(scales, 0, count))


def _branch(layer: Layer) -> tuple[Recipe, Recipe] | None:
    names = ("svdquant_lora_a", "svdquant_lora_b")
    if not all(name in layer.own for name in names):
        return None
    return layer.own[names[0]], layer.own[names[1]]


_ONE = Recipe.of_array(np.array(1.0, np.float32))
