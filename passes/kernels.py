"""The operations of recipes on arrays: small, vectorized, and each with the ONNX operator it must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto

from passes.base import PassError
from passes.block_kernels import BLOCK_KERNELS, plain_arguments
from passes.sources import np_dtype, read
from passes.weights import Array, Recipe, RecipeValues

# The largest magnitude of each quantized type; ONNX QuantizeLinear saturates there.
BOUNDS: dict[int, tuple[float, float]] = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.INT4: (-8.0, 7.0),
    TensorProto.FLOAT8E4M3FN: (-448.0, 448.0),
    TensorProto.FLOAT4E2M1: (-6.0, 6.0),
}


def _cast(x: Array, args: Mapping[str, Any]) -> Array:
    target = np_dtype(args["to"])
    if args["to"] == TensorProto.FLOAT8E4M3FN:  # ml_dtypes overflows to NaN where ONNX Cast saturates
        x = np.clip(x.astype(np.float32), -448.0, 448.0)
    return x.astype(target)


def _transpose(x: Array, args: Mapping[str, Any]) -> Array:
    return x.transpose(args["perm"])


def _reshape(x: Array, args: Mapping[str, Any]) -> Array:
    return x.reshape(args["shape"])


def _multiply(x: Array, args: Mapping[str, Any]) -> Array:
    by = evaluate(Recipe.from_json(args["by"])).astype(np.float32)
    return (x.astype(np.float32) * by).astype(x.dtype)


def _spread(scale: Array, shape: tuple[int, ...], axis: int | None, block_size: int) -> Array:
    """A scale as QuantizeLinear broadcasts it: per tensor, per channel on `axis`, or per block."""
    if axis is None or scale.ndim == 0:
        return scale.reshape(())
    if block_size:
        return np.repeat(scale, block_size, axis=axis)[tuple(slice(n) for n in shape)]
    return scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def _scale_of_amax(x: Array, args: Mapping[str, Any]) -> Array:
    return x.astype(np.float32) / np.float32(args["bound"])


def _amax(x: Array, args: Mapping[str, Any]) -> Array:
    del args
    return np.asarray(np.abs(x.astype(np.float32)).max(initial=0.0))


def _spread_blocks(x: Array, args: Mapping[str, Any]) -> Array:
    return np.repeat(x, args["times"], axis=-1)[..., : args["length"]]


def _scaled(x: Array, args: Mapping[str, Any]) -> Array:
    """x / scale in float32; where the scale was made of an amax, by the factor that ModelOpt multiplies with."""
    wide, scale = x.astype(np.float32), Recipe.from_json(args["scale"])
    axis, block_size = args["axis"], args["block_size"]
    for i, op in enumerate(scale.ops):
        if op.name == "scale_of_amax" and all(o.name == "cast" for o in scale.ops[i + 1 :]):
            amax = evaluate(Recipe(scale.source, scale.ops[:i], scale.source.dtype, scale.shape))
            factor = _modelopt_factor(amax.astype(np.float32), op.args["bound"], args["to"])
            wide *= _spread(factor, x.shape, axis, block_size)
            return wide
    wide /= _spread(evaluate(scale).astype(np.float32), x.shape, axis, block_size)
    return wide


def _modelopt_factor(amax: Array, bound: float, to: int) -> Array:
    """bound / amax to the last bit of ModelOpt's tensor_quant.py: 16-bit weights often fall on an exact tie.

    Its FP8 code divides a Python number by a tensor, which torch computes as reciprocal times number.
    """
    if to == TensorProto.FLOAT8E4M3FN:
        return np.float32(1) / amax * np.float32(bound)
    return np.float32(bound) / amax


def _quantize(x: Array, args: Mapping[str, Any]) -> Array:
    low, high = BOUNDS[args["to"]]
    scaled = _scaled(x, args)
    np.clip(scaled, low, high, out=scaled)
    if args["to"] in (TensorProto.INT8, TensorProto.INT4):
        np.rint(scaled, out=scaled)
    return scaled.astype(np_dtype(args["to"]))  # ml_dtypes rounds to nearest even


def _dequantize(x: Array, args: Mapping[str, Any]) -> Array:
    scale = evaluate(Recipe.from_json(args["scale"])).astype(np.float32)
    wide = x.astype(np.float32) * _spread(scale, x.shape, args["axis"], args["block_size"])
    return wide.astype(np_dtype(args["to"]))


def _block_kernel(name: str) -> Callable[[Array, Mapping[str, Any]], Array]:
    function, recipes = BLOCK_KERNELS[name]

    def kernel(x: Array, args: Mapping[str, Any]) -> Array:
        arrays = {key: evaluate(Recipe.from_json(args[key])) for key in recipes}
        return function(x, **arrays, **plain_arguments(dict(args)))

    return kernel


KERNELS: dict[str, Callable[[Array, Mapping[str, Any]], Array]] = {
    "cast": _cast,
    "transpose": _transpose,
    "reshape": _reshape,
    "multiply": _multiply,
    "scale_of_amax": _scale_of_amax,
    "amax": _amax,
    "spread_blocks": _spread_blocks,
    "quantize": _quantize,
    "dequantize": _dequantize,
    **{name: _block_kernel(name) for name in BLOCK_KERNELS},
}


def evaluate(recipe: Recipe) -> Array:
    """The array that a recipe describes. Needs memory for one tensor. Raises PassError on unknown operations."""
    array = read(recipe.source)
    for op in recipe.ops:
        if op.name not in KERNELS:
            raise PassError(f"unknown weight operation {op.name!r}. Known: {', '.join(KERNELS)}")
        array = KERNELS[op.name](array, op.args)
    return array


def to_bytes(array: Array) -> memoryview:
    """The bytes of an array as ONNX stores them: little endian, 4-bit types packed low nibble first."""
    array = np.ascontiguousarray(array)
    if array.dtype in (
        np.dtype(ml_dtypes.int4),
        np.dtype(ml_dtypes.uint4),
        np.dtype(ml_dtypes.float4_e2m1fn),
    ):
        nibbles = array.view(np.uint8).reshape(-1) & 15
        if nibbles.size % 2:
            nibbles = np.append(nibbles, np.uint8(0))
        array = nibbles[0::2] | (nibbles[1::2] << 4)
    return array.reshape(-1).view(np.uint8).data


RecipeValues.evaluate = staticmethod(evaluate)
