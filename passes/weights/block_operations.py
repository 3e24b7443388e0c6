"""Recipe operations of the formats with block scales, as ModelOpt's kernels compute them.

Those are nvfp4_quant.py (Triton) and tensor_quant_mx.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from passes.weights.recipe import Array
from passes.weights.rounding import nearest, scratch

E4M3_MAX, E2M1_MAX = 448.0, 6.0
_TINY_SCALE = 1e-5
"""Below it ModelOpt divides by 1 instead: such a block becomes zeros."""
_E4M3, _E2M1 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float4_e2m1fn)
_PIECE = 1 << 18


def _magnitudes(x: Array) -> Array:
    """|x| as unsigned integers in the same order: a float's bits without the sign (NaN is the largest); scratch."""
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    bits = np.ascontiguousarray(x).view(unsigned)
    mask = unsigned.type((1 << 8 * x.dtype.itemsize - 1) - 1)
    magnitudes = scratch("magnitudes", x.shape, unsigned)
    np.bitwise_and(bits, mask, out=magnitudes)
    return magnitudes


def block_amax(x: Array, block_size: int) -> Array:
    """The amax of each block of the last axis, float32 [..., blocks, 1]; `x` is float32, float16 or bfloat16."""
    blocks = _magnitudes(x).reshape(*x.shape[:-1], -1, block_size)
    amax = blocks[..., 0].copy()
    for i in range(1, block_size):  # far faster than max(axis=-1)
        np.maximum(amax, blocks[..., i], out=amax)
    return amax.view(x.dtype).astype(np.float32)[..., np.newaxis]


def largest(x: Array) -> Array:
    """The largest magnitude of the whole array, a float32 scalar; 0 when it is empty."""
    if x.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        return np.asarray(np.abs(x.astype(np.float32)).max(initial=0.0))
    rows = x.reshape(1, 1) if x.ndim == 0 else x
    size = max(1, _PIECE // max(1, rows[:1].size))
    parts = [_magnitudes(rows[i : i + size]).max(initial=0) for i in range(0, len(rows), size)]
    bits = np.asarray(max(parts, default=0), np.dtype(f"u{x.dtype.itemsize}"))
    return bits.view(x.dtype).astype(np.float32)


def _wide(x: Array, block_size: int) -> Array:
    """x in float32 as [..., blocks, block_size]; scratch."""
    wide = scratch("wide", x.shape, np.float32)
    wide[...] = x
    return wide.reshape(*x.shape[:-1], -1, block_size)


def nvfp4_scales(x: Array, scale: Array, block_size: int, four_six: bool = False) -> Array:
    """E4M3 block scales: blockamax / (6 * scale), saturated at 448; with `four_six` over 4 where that is nearer."""
    return (_nearer(x, scale, block_size) if four_six else _at(x, scale, block_size, E2M1_MAX)).scales


def nvfp4_values(x: Array, scale: Array, block_size: int, four_six: bool = False) -> Array:
    """E2M1 values: x over its block's scale, to nearest with ties to even, saturated at 6."""
    found = _nearer(x, scale, block_size) if four_six else _at(x, scale, block_size, E2M1_MAX)
    return found.values.reshape(x.shape)


@dataclass(frozen=True)
class _Rounded:
    """NVFP4 of blocks: values [..., blocks, block_size], scales [..., blocks], and these times that of the tensor."""

    values: Array
    scales: Array
    steps: Array


def _at(x: Array, scale: Array, block_size: int, top: float) -> _Rounded:
    """NVFP4 in which the largest magnitude of a block becomes `top`."""
    scale = scale.astype(np.float32).reshape(())
    ratio = block_amax(x, block_size) / (np.float32(top) * scale)
    scales = nearest(np.minimum(ratio, np.float32(E4M3_MAX)), _E4M3)
    steps = scales.astype(np.float32) * scale
    steps = np.where(steps >= np.float32(_TINY_SCALE), steps, np.float32(1))
    wide = _wide(x, block_size)
    wide /= steps
    return _Rounded(nearest(wide, _E2M1), scales[..., 0], steps)


def _nearer(x: Array, scale: Array, block_size: int) -> _Rounded:
    """ "Four over six": each block with the largest at 6 or at 4, by the squared error; 6 where both are alike."""
    six, four = (_at(x, scale, block_size, top) for top in (E2M1_MAX, 4.0))
    blocks = x.astype(np.float32).reshape(six.values.shape)
    better = _squared_error(four, blocks) < _squared_error(six, blocks)
    return _Rounded(
        np.where(better[..., np.newaxis], four.values, six.values),
        np.where(better, four.scales, six.scales),
        np.where(better[..., np.newaxis], four.steps, six.steps),
    )


def _squared_error(rounded: _Rounded, blocks: Array) -> Array:
    """The error of each block, [..., blocks]: in float64, one element after another, so that torch gets the same."""
    total = np.zeros(blocks.shape[:-1])
    for i in range(blocks.shape[-1]):
        value = rounded.values[..., i].astype(np.float32) * rounded.steps[..., 0]
        error = value.astype(np.float64) - blocks[..., i].astype(np.float64)
        total += error * error
    return total


def mxfp8_exponents(amax: Array) -> Array:
    """ceil(log2(amax / 448)) in -127 to 127; 0 where amax is 0 or not finite. Exact: read off the exponent bits."""
    mantissa, exponent = np.frexp(amax.astype(np.float64) / E4M3_MAX)
    power = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), -127, 127)
    return np.where((amax == 0) | ~np.isfinite(amax), 0, power).astype(np.int32)


def mxfp8_scales(x: Array, block_size: int) -> Array:
    """UINT8 exponents + 127 of the blocks."""
    return (mxfp8_exponents(block_amax(x, block_size))[..., 0] + 127).astype(np.uint8)


def mxfp8_values(x: Array, block_size: int) -> Array:
    """E4M3 values: x over its block's power of two, to nearest with ties to even."""
    wide = _wide(x, block_size)
    wide *= np.ldexp(np.float32(1), -mxfp8_exponents(block_amax(x, block_size)))
    np.clip(wide, -E4M3_MAX, E4M3_MAX, out=wide)
    return nearest(wide, _E4M3).reshape(x.shape)


def subtract_product(x: Array, left: Array, right: Array) -> Array:
    """x - left @ right, the product in float64: any implementation then rounds it to the same float32."""
    product = left.astype(np.float64) @ right.astype(np.float64)
    return (x.astype(np.float64) - product).astype(np.float32).astype(x.dtype)


BLOCK_KERNELS: dict[str, tuple[Callable[..., Array], tuple[str, ...], bool]] = {
    "nvfp4_scales": (nvfp4_scales, ("scale",), True),
    "nvfp4_values": (nvfp4_values, ("scale",), False),
    "mxfp8_scales": (mxfp8_scales, (), True),
    "mxfp8_values": (mxfp8_values, (), False),
    "subtract_product": (subtract_product, ("left", "right"), False),
}
"""Name of the operation -> its function, which of its arguments are recipes, and whether it gives one per block."""


def plain_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are numbers."""
    return {name: value for name, value in args.items() if isinstance(value, (int, float))}
