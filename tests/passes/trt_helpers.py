"""Models with TensorRT's operators, and what those compute, written down from the definition of the formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto

from passes.weights.recipe import Recipe

E2M1_GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# All E4M3 numbers from 0 to 448, from their bits: 0.mmm * 2^-6 and 1.mmm * 2^(e - 7).
E4M3_GRID = np.array([m / 8 * 2.0**-6 for m in range(8)])
E4M3_GRID = np.append(E4M3_GRID, [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1])


def trt_model(graph: str, initializers: Mapping[str, Any] | None = None, opset: int = 23) -> ModelProto:
    """A model from ONNX text that imports domain `trt`; arrays and recipes become initializers."""
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}, "trt": 1]> {graph}')
    for name, value in (initializers or {}).items():
        tensor = value.to_tensor(name) if isinstance(value, Recipe) else None
        made.graph.initializer.append(tensor or onnx.numpy_helper.from_array(np.asarray(value), name))
    return made


def round_to(grid: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x to the nearest number of `grid` (sign aside), ties to the one of even index, saturating; in float64.

    Even index is even mantissa, since both grids begin with 0 and have a power of two of numbers an octave.
    """
    size = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    upper = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
    lower = upper - 1
    middle = (grid[lower] + grid[upper]) / 2  # exact in float64
    even = np.where(lower % 2 == 0, lower, upper)
    index = np.where(size < middle, lower, np.where(size > middle, upper, even))
    return np.copysign(grid[index], x)


def nvfp4(x: np.ndarray, s2: float, block: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """E2M1 values and E4M3 block scales as float64."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, block)
    amax = np.abs(blocks).max(-1)
    with np.errstate(over="ignore"):
        ratio = amax / (np.float32(6) * np.float32(s2))
    scales = round_to(E4M3_GRID, ratio)
    step = scales.astype(np.float32) * np.float32(s2)
    step = np.where(step < np.float32(1e-5), np.float32(1), step)
    with np.errstate(over="ignore"):
        return round_to(E2M1_GRID, (blocks / step[..., None])).reshape(x.shape), scales


def mxfp8(x: np.ndarray, block: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values as float64 and exponents + 127."""
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, block)
    amax = np.abs(blocks).max(-1)
    # The smallest e with amax <= 448 * 2^e, found among all of them.
    powers = 448 * np.ldexp(1.0, np.arange(-127, 128))
    exponent = np.searchsorted(powers, amax).clip(0, 254)
    exponent = np.where(amax == 0, 127, exponent)
    values = round_to(E4M3_GRID, blocks / np.ldexp(1.0, exponent - 127)[..., None])
    return values.reshape(x.shape), exponent


def hard_inputs(seed: int, dtype: Any = np.float32, columns: int = 128) -> dict[str, np.ndarray]:
    """Arrays [rows, columns] that rounding goes wrong on: many scales, ties, zeros, tiny and huge numbers."""
    rng = np.random.default_rng(seed)
    shape = (48, columns)
    spread = rng.standard_normal(shape) * np.exp2(rng.integers(-9, 9, (48, 1)))
    ties = rng.integers(-96, 97, shape) / 16.0
    ties[:, ::16] = 6.0
    info = ml_dtypes.finfo(dtype)
    tiny = rng.integers(-9, 10, shape) * float(info.smallest_subnormal)
    huge = rng.uniform(-1, 1, shape) * float(info.max)
    powers = np.exp2(rng.integers(-12, 13, (48, columns // 32))) * 448.0
    powers = np.minimum(powers, float(info.max) / 2)
    near = np.repeat(powers, 32, -1) * np.where(np.arange(columns) % 32, rng.uniform(-1, 1, shape), 1)
    sparse = np.where(rng.random(shape) < 0.05, rng.standard_normal(shape), 0.0)
    sparse[:4] = -0.0
    steps = near.astype(np.float32)
    steps[::3] = np.nextafter(steps[::3], np.float32(np.inf))
    steps[1::3] = np.nextafter(steps[1::3], np.float32(0))
    arrays = {
        "spread": spread,
        "ties": ties,
        "tiny": tiny,
        "huge": huge,
        "powers of two": steps,
        "sparse": sparse,
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}
