"""Folders of ModelOpt's `mtq.quantize` and `mtq.compress` after `save_pretrained`: scales beside quantizers.

| weight                | weight_quantizer               | a weight is                            |
|-----------------------|--------------------------------|----------------------------------------|
| E4M3 [N, K]           | _scale () or [N, 1]            | code * scale                           |
| I8 [N, K]             | _scale () or [N, 1]            | code * scale                           |
| U8 [N, K/2]           | _scale [N * K/128, 1]          | (nibble - 8) / scale, upper half first |
| U8 [N, K/2]           | _scale E4M3, _double_scale     | E2M1 * scale * double, lower half first|
| E4M3 [N, K]           | _scale U8 [N, K/32]            | code * 2^(scale - 127)                 |
| 16 bits, not packed   | _amax () or [N, 1]             | rounded to code * amax / bound         |

Inputs have `input_quantizer._amax`, and `_pre_quant_scale` where channels are scaled.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from onnx import TensorProto

from diffc.models.stored.held import Held, HeldInput
from diffc.models.stored.layer import E4M3, FLOAT, Layer
from passes.weights.recipe import Recipe
from passes.weights.stored import bits_as, power_of_two, reciprocal, unpack

_WEIGHT, _INPUT = "weight_quantizer.", "input_quantizer."
SUFFIXES = (
    *(f"{_WEIGHT}{name}" for name in ("_scale", "_double_scale", "_scale_zeros", "_amax", "_global_amax")),
    *(f"{_WEIGHT}{name}" for name in ("_svdquant_lora_a", "_svdquant_lora_b", "0._amax", "1._amax")),
    *(f"{_INPUT}{name}" for name in ("_amax", "_pre_quant_scale")),
    "output_quantizer._amax",
)
_U8, _I8, _INT4 = int(TensorProto.UINT8), int(TensorProto.INT8), int(TensorProto.INT4)
_E2M1 = int(TensorProto.FLOAT4E2M1)
_BOUNDS = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6.0 * 448.0}
_INPUT_OF = {"fp8": "fp8", "int8": "int8", "int4": "fp8", "nvfp4": "nvfp4"}
"""What ModelOpt's presets quantize an input to where they do, by the kind of the weight."""


def is_idle(own: Collection[str]) -> bool:
    """Whether it has ranges of inputs and outputs alone: ModelOpt quantizes norms as well, which diffc leaves out."""
    return "weight" not in own and all(key.startswith((_INPUT, "output_quantizer.")) for key in own)


def read(layer: Layer) -> Held | Recipe:
    """The layer as it is held; its plain weight where that has no quantizer.

    Raises UnsupportedError for NF4, and for weights of which only the range is kept.
    """
    if not any(key.startswith(_WEIGHT) for key in layer.own):
        return layer.weight
    kind, weight = _weight(layer)
    return Held(kind, weight, _input(layer, kind), layer.own.get(f"{_INPUT}_pre_quant_scale"), _branch(layer))


def _weight(layer: Layer) -> tuple[str, Recipe]:
    codes, scale = layer.weight, layer.own.get(f"{_WEIGHT}_scale")
    if f"{_WEIGHT}_scale_zeros" in layer.own:
        raise layer.refuse("to NF4")
    if scale is None:
        return _simulated(layer)
    if codes.dtype == E4M3 and scale.dtype == _U8:
        return "mxfp8", codes.dequantize(power_of_two(scale), 1, codes.shape[1] // scale.shape[1])
    if codes.dtype in (E4M3, _I8):
        return ("fp8" if codes.dtype == E4M3 else "int8"), _scaled(codes, scale)
    if codes.dtype == _U8 and f"{_WEIGHT}_double_scale" in layer.own:
        values, tensor = unpack(codes, _E2M1), layer.scalar(f"{_WEIGHT}_double_scale")
        assert tensor is not None
        return "nvfp4", values.dequantize(bits_as(scale, E4M3).dequantize(tensor), 1, 16)
    if codes.dtype == _U8:
        values = unpack(codes, _INT4, high_first=True, offset=8)
        block = math.prod(values.shape) // math.prod(scale.shape)
        blocks = scale.reshape((values.shape[0], values.shape[1] // block))
        return "int4", values.dequantize(reciprocal(blocks), 1, block)
    raise layer.refuse(f"to codes of type {TensorProto.DataType.Name(codes.dtype)}")


def _scaled(codes: Recipe, scale: Recipe) -> Recipe:
    scale, size = scale.cast(FLOAT), math.prod(scale.shape)
    if size == 1:
        return codes.dequantize(scale.reshape(()) if scale.shape else scale)
    if size != codes.shape[0]:
        raise ValueError(f"{size} scales for {codes.shape[0]} rows")
    return codes.dequantize(scale.reshape((size,)), axis=0)


def _simulated(layer: Layer) -> tuple[str, Recipe]:
    """A 16-bit weight whose quantizer has its range: rounded here as ModelOpt rounds it whenever it runs."""
    bits, amax = layer.told.get("num_bits"), layer.own.get(f"{_WEIGHT}_amax")
    kind = {8: "int8", (4, 3): "fp8"}.get(tuple(bits) if isinstance(bits, (list, tuple)) else bits)
    if kind is None or amax is None or math.prod(amax.shape) not in (1, layer.weight.shape[0]):
        raise layer.refuse(
            f"to {bits or 'a type that nothing names'} in name only (the folder has 16-bit weights beside the ranges of"
            " quantizers)",
            fix="call mtq.compress before save_pretrained, or mto.save and give that file to --from-checkpoint",
        )
    size = math.prod(amax.shape)
    amax = amax.cast(FLOAT).reshape((size,)) if size > 1 else amax.cast(FLOAT).reshape(())
    scale, axis = amax.scale_of_amax(_BOUNDS[kind]), 0 if size > 1 else None
    stored = E4M3 if kind == "fp8" else _I8
    return kind, layer.weight.quantize(scale, stored, axis).dequantize(scale, axis)


def _input(layer: Layer, kind: str) -> HeldInput | None:
    if kind == "mxfp8":
        return HeldInput("mxfp8")
    amax = layer.scalar(f"{_INPUT}_amax")
    if amax is None:
        return None
    chosen = _INPUT_OF[kind]
    return HeldInput(chosen, amax.scale_of_amax(_BOUNDS[chosen]))


def _branch(layer: Layer) -> tuple[Recipe, Recipe] | None:
    a, b = (layer.own.get(f"{_WEIGHT}_svdquant_lora_{side}") for side in "ab")
    return None if a is None or b is None else (a, b)
