"""What a quantizer does to numbers, as a value that can be compared: the grid of QuantizeLinear nodes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes.graph.match import array_of, input_of
from passes.weights.evaluate import BOUNDS, evaluate
from passes.weights.recipe import Array, dtype_of, recipe_of
from passes.weights.sources import np_dtype


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor may take after quantization.

    `dtype` is the quantized type, `wide` that of the scale and of what is quantized. `scale` and `zero` name
    the values: equal names, equal values; `zero` is empty when there is none or all are zero. `axis` counts
    from 0 and is None for one scale per tensor.
    """

    dtype: int
    wide: int
    scale: str
    zero: str = ""
    axis: int | None = None
    block_size: int = 0

    def on(self, axis: int | None) -> Grid:
        """The same grid along another axis."""
        return replace(self, axis=axis)


def identity(tensor: gs.Tensor) -> str:
    """A name for the values of a tensor: the same for constants that hold the same."""
    if (recipe := recipe_of(tensor)) is not None:
        return json.dumps(recipe.to_json(), sort_keys=True)
    if isinstance(tensor, gs.Constant) and (array := array_of(tensor)) is not None:
        return f"{array.dtype} {array.shape} {sha256(array.tobytes()).hexdigest()}"
    return f"tensor {id(tensor)}"


def small_values(tensor: gs.Tensor) -> Array | None:
    """The values of a constant that lie in the graph, or in the recipe itself (scales); None for all others."""
    recipe = recipe_of(tensor)
    if recipe is None:
        return array_of(tensor) if isinstance(tensor, gs.Constant) else None
    return evaluate(recipe) if recipe.source.kind == "inline" else None


def quantized_type(node: gs.Node) -> int:
    """The element type that a QuantizeLinear makes: that of its zero point, else of `output_dtype`, else UINT8."""
    zero = input_of(node, 2)
    if zero is not None:
        return dtype_of(zero) or int(TensorProto.UNDEFINED)
    return int(node.attrs.get("output_dtype", 0)) or int(TensorProto.UINT8)


def grid_of(node: gs.Node) -> Grid | None:
    """The grid of a QuantizeLinear or DequantizeLinear; None where it does not fit into one.

    That is with types or a rank that are not known, without saturation, or with other types than that of the
    scale on the wide side.
    """
    wide_side, narrow_side = (node.inputs[0], node.outputs[0])[:: 1 if node.op == "QuantizeLinear" else -1]
    scale, zero = node.inputs[1], input_of(node, 2)
    dtype, wide = dtype_of(narrow_side), dtype_of(scale)
    attrs = node.attrs
    if dtype is None or wide is None or dtype_of(wide_side) != wide:
        return None
    if attrs.get("precision", 0) not in (0, wide) or not attrs.get("saturate", 1):
        return None
    if scale.shape is None:
        return None
    shape = tuple(scale.shape)
    if shape in ((), (1,)):
        return Grid(dtype, wide, _scalar_identity(scale), _zero_identity(zero))
    if narrow_side.shape is None:
        return None
    axis = attrs.get("axis", 1) % len(narrow_side.shape)
    return Grid(dtype, wide, identity(scale), _zero_identity(zero), axis, attrs.get("block_size", 0))


def _scalar_identity(scale: gs.Tensor) -> str:
    """One number is the same as [] and as [1]."""
    values = small_values(scale)
    return identity(scale) if values is None else f"{values.dtype} {values.tobytes().hex()}"


def _zero_identity(zero: gs.Tensor | None) -> str:
    if zero is None:
        return ""
    values = array_of(zero)
    if values is None:
        return identity(zero)
    return f"{values.tobytes().hex()}" if np.any(values.astype(np.float32)) else ""


def survives_round_trip(node: gs.Node) -> bool:
    """Whether QuantizeLinear gives back every code that this DequantizeLinear can read, found by trying all.

    False when that cannot be known: a scale that is computed, blocks, or a type of more than 8 bits.
    """
    grid, scale, zero = grid_of(node), small_values(node.inputs[1]), input_of(node, 2)
    if grid is None or grid.block_size or scale is None or grid.dtype not in _CODES:
        return False
    zeros = np.zeros((), np.float32) if zero is None else small_values(zero)
    if zeros is None:
        return False
    wide = scale.astype(np.float32)
    return _all_codes_survive(grid.dtype, grid.wide, wide.tobytes(), zeros.astype(np.float32).tobytes())


_CODES: dict[int, np.dtype[Any]] = {
    int(TensorProto.INT8): np.dtype(np.int8),
    int(TensorProto.UINT8): np.dtype(np.uint8),
    int(TensorProto.FLOAT8E4M3FN): np.dtype(ml_dtypes.float8_e4m3fn),
}
_LIMITS = {**BOUNDS, TensorProto.UINT8: (0.0, 255.0)}


@lru_cache(maxsize=4096)
def _all_codes_survive(dtype: int, wide: int, scales: bytes, zeros: bytes) -> bool:
    """Both ways to divide are tried: in float32, as runtimes do, and in the type of the scale."""
    scale, zero = (np.frombuffer(data, np.float32).reshape(-1, 1) for data in (scales, zeros))
    every = np.arange(256, dtype=np.uint8).view(_CODES[dtype])
    codes = every[np.isfinite(every.astype(np.float32))].reshape(1, -1)
    with np.errstate(all="ignore"):
        values = ((codes.astype(np.float32) - zero) * scale).astype(np_dtype(wide)).astype(np.float32)
        exact = values / scale
        for scaled in (exact, exact.astype(np_dtype(wide)).astype(np.float32)):
            back = scaled if dtype == TensorProto.FLOAT8E4M3FN else np.rint(scaled) + zero
            back = np.clip(back, *_LIMITS[dtype]).astype(_CODES[dtype])
            if not np.array_equal(back.view(np.uint8), np.broadcast_to(codes, back.shape).view(np.uint8)):
                return False
    return True
