"""The operations of recipes on arrays: vectorized, over rows, and each with the ONNX operator it must equal.

An operation is bound to its arguments once; the step that this gives runs over pieces that fit the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import TensorProto

from passes.base import PassError
from passes.weights.block_operations import BLOCK_KERNELS, E2M1_MAX, E4M3_MAX, largest, plain_arguments
from passes.weights.delta_operations import DELTA_BINDERS
from passes.weights.recipe import Array, Op, Recipe
from passes.weights.rounding import nearest, scratch
from passes.weights.sources import np_dtype
from passes.weights.step import Evaluate, Shape, Step
from passes.weights.stored_operations import STORED_BINDERS

# The largest magnitude of each quantized type; ONNX QuantizeLinear saturates there.
BOUNDS: dict[int, tuple[float, float]] = {
    TensorProto.INT8: (-128.0, 127.0),
    TensorProto.INT4: (-8.0, 7.0),
    TensorProto.FLOAT8E4M3FN: (-E4M3_MAX, E4M3_MAX),
    TensorProto.FLOAT4E2M1: (-E2M1_MAX, E2M1_MAX),
}


def bind(op: Op, shape: Shape, evaluate: Evaluate) -> Step:
    """The step of `op` on an input of `shape`; recipes among its arguments are evaluated now.

    Raises PassError on an unknown operation.
    """
    if op.name in BLOCK_KERNELS:
        return _block_step(op, shape, evaluate)
    if op.name not in BINDERS:
        known = ", ".join((*BINDERS, *BLOCK_KERNELS))
        raise PassError(f"unknown weight operation {op.name!r}. Known: {known}")
    return BINDERS[op.name](op.args, shape, evaluate)


def _argument(data: Mapping[str, Any], evaluate: Evaluate) -> Array:
    return evaluate(Recipe.from_json(data)).astype(np.float32)


def _cast(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    target = np_dtype(args["to"])

    def run(x: Array, _: slice) -> Array:
        if args["to"] == TensorProto.FLOAT8E4M3FN:  # ml_dtypes overflows to NaN where ONNX Cast saturates
            return nearest(np.clip(x.astype(np.float32), *BOUNDS[args["to"]]), target)
        return x.astype(target)

    return Step(run, shape, by_element=True)


def _transpose(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    result = tuple(shape[i] for i in args["perm"])
    return Step(lambda x, _: x.transpose(args["perm"]), result, by_rows=False)


def _reshape(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    result = tuple(args["shape"])
    if shape and result and shape[0] == result[0] and math.prod(shape):
        return Step(lambda x, _: x.reshape(x.shape[0], *result[1:]), result)
    return Step(lambda x, _: x.reshape(result), result, by_rows=False)


def _append(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    others = [Recipe.from_json(data) for data in args["others"]]
    result = (shape[0] + sum(other.shape[0] for other in others), *shape[1:])
    return Step(lambda x, _: np.concatenate([x, *map(evaluate, others)]), result, by_rows=False)


def _multiply(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    by = _argument(args["by"], evaluate)
    result = np.broadcast_shapes(shape, by.shape)
    single = by.size == 1 and result == shape
    by = by.reshape(()) if single else by
    rowwise = by.ndim == len(shape) > 0 and by.shape[0] > 1

    def run(x: Array, rows: slice) -> Array:
        return (x.astype(np.float32) * (by[rows] if rowwise else by)).astype(x.dtype)

    return Step(run, result, by_rows=result == shape, by_element=single)


def _spread(scale: Array, shape: Shape, args: Mapping[str, Any]) -> Callable[[slice], Array]:
    """A scale as QuantizeLinear broadcasts it to the rows that are asked for: per tensor, channel or block."""
    axis, block_size = args["axis"], args["block_size"]
    if axis is None or scale.ndim == 0:
        flat = scale.reshape(())
        return lambda _: flat
    axis %= len(shape)
    if not block_size:
        scale = scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        return lambda rows: scale[rows] if axis == 0 and scale.shape[0] > 1 else scale
    if axis == 0:
        return lambda rows: scale[np.arange(rows.start, rows.stop) // block_size]
    inside = tuple(slice(n) for n in shape[1:])
    return lambda rows: np.repeat(scale[rows], block_size, axis=axis)[:, *inside]


def _scale_of_amax(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    return Step(lambda x, _: x.astype(np.float32) / np.float32(args["bound"]), shape, by_element=True)


def _amax(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    del args, shape
    return Step(lambda x, _: largest(x), (), by_rows=False)


def _spread_blocks(args: Mapping[str, Any], shape: Shape, _: Evaluate) -> Step:
    def run(x: Array, _: slice) -> Array:
        return np.repeat(x, args["times"], axis=-1)[..., : args["length"]]

    return Step(run, (*shape[:-1], args["length"]), by_rows=len(shape) > 1)


def _factor(args: Mapping[str, Any], evaluate: Evaluate) -> tuple[Array, bool]:
    """What x is multiplied with, or (False) divided by: of a scale that was made of an amax, ModelOpt's factor."""
    scale = Recipe.from_json(args["scale"])
    for i, op in enumerate(scale.ops):
        if op.name == "scale_of_amax" and all(o.name == "cast" for o in scale.ops[i + 1 :]):
            amax = evaluate(Recipe(scale.source, scale.ops[:i], scale.source.dtype, scale.shape))
            return _modelopt_factor(amax.astype(np.float32), op.args["bound"], args["to"]), True
    return evaluate(scale).astype(np.float32), False


def _modelopt_factor(amax: Array, bound: float, to: int) -> Array:
    """bound / amax to the last bit of ModelOpt's tensor_quant.py: 16-bit weights often fall on an exact tie.

    Its FP8 code divides a Python number by a tensor, which torch computes as reciprocal times number.
    """
    if to == TensorProto.FLOAT8E4M3FN:
        return np.float32(1) / amax * np.float32(bound)
    return np.float32(bound) / amax


def _quantize(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    factor, multiplies = _factor(args, evaluate)
    spread, target = _spread(factor, shape, args), np_dtype(args["to"])
    low, high = BOUNDS[args["to"]]
    apply = np.multiply if multiplies else np.divide

    def run(x: Array, rows: slice) -> Array:
        scaled = scratch("wide", x.shape, np.float32)
        scaled[...] = x
        apply(scaled, spread(rows), out=scaled)
        np.clip(scaled, low, high, out=scaled)
        if args["to"] in (TensorProto.INT8, TensorProto.INT4):
            np.rint(scaled, out=scaled)
            return scaled.astype(target)
        return nearest(scaled, target)

    return Step(run, shape, by_element=args["axis"] is None or factor.ndim == 0)


def _dequantize(args: Mapping[str, Any], shape: Shape, evaluate: Evaluate) -> Step:
    scale, target = _argument(args["scale"], evaluate), np_dtype(args["to"])
    spread = _spread(scale, shape, args)

    def run(x: Array, rows: slice) -> Array:
        return (x.astype(np.float32) * spread(rows)).astype(target)

    return Step(run, shape, by_element=args["axis"] is None or scale.ndim == 0)


def _block_step(op: Op, shape: Shape, evaluate: Evaluate) -> Step:
    function, recipes, divides = BLOCK_KERNELS[op.name]
    arrays = {key: evaluate(Recipe.from_json(op.args[key])) for key in recipes}
    plain = plain_arguments(dict(op.args))

    def run(x: Array, rows: slice) -> Array:
        mine = {key: array[rows] if key == "left" else array for key, array in arrays.items()}
        return function(x, **mine, **plain)

    result = (*shape[:-1], shape[-1] // plain["block_size"]) if divides else shape
    return Step(run, result, by_rows=len(shape) > 1)


BINDERS: dict[str, Callable[[Mapping[str, Any], Shape, Evaluate], Step]] = {
    "cast": _cast,
    "transpose": _transpose,
    "reshape": _reshape,
    "append": _append,
    "multiply": _multiply,
    "scale_of_amax": _scale_of_amax,
    "amax": _amax,
    "spread_blocks": _spread_blocks,
    "quantize": _quantize,
    "dequantize": _dequantize,
    **DELTA_BINDERS,
    **STORED_BINDERS,
}
