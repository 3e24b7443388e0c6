"""Recipe operations of the formats with block scales, as ModelOpt's kernels compute them.

Those are nvfp4_quant.py (Triton) and tensor_quant_mx.cu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from passes.weights import Array

E4M3_MAX, E2M1_MAX = 448.0, 6.0
_TINY_SCALE = 1e-5
"""Below it ModelOpt divides by 1 instead: such a block becomes zeros."""


def _block_amax(x: Array, block_size: int) -> tuple[Array, Array]:
    """x in float32 as [..., blocks, block_size], and the amax of each block [..., blocks, 1]."""
    wide = x.astype(np.float32).reshape(*x.shape[:-1], -1, block_size)
    return wide, np.abs(wide).max(axis=-1, keepdims=True)


def nvfp4_scales(x: Array, scale: Array, block_size: int) -> Array:
    """E4M3 block scales: blockamax / (6 * scale), saturated at 448."""
    _, amax = _block_amax(x, block_size)
    return _nvfp4_scales(amax, scale)[..., 0]


def _nvfp4_scales(amax: Array, scale: Array) -> Array:
    ratio = amax / (np.float32(E2M1_MAX) * scale.astype(np.float32).reshape(()))
    scales: Array = np.minimum(ratio, np.float32(E4M3_MAX)).astype(ml_dtypes.float8_e4m3fn)
    return scales


def nvfp4_values(x: Array, scale: Array, block_size: int) -> Array:
    """E2M1 values: x over its block's scale, to nearest with ties to even, saturated at 6."""
    wide, amax = _block_amax(x, block_size)
    scale = scale.astype(np.float32).reshape(())
    step = _nvfp4_scales(amax, scale).astype(np.float32) * scale
    wide /= np.where(step >= np.float32(_TINY_SCALE), step, np.float32(1))
    np.clip(wide, -E2M1_MAX, E2M1_MAX, out=wide)
    return wide.astype(ml_dtypes.float4_e2m1fn).reshape(x.shape)


def mxfp8_exponents(amax: Array) -> Array:
    """ceil(log2(amax / 448)) in -127 to 127; 0 where amax is 0 or not finite. Exact: read off the exponent bits."""
    mantissa, exponent = np.frexp(amax.astype(np.float64) / E4M3_MAX)
    power = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent), -127, 127)
    return np.where((amax == 0) | ~np.isfinite(amax), 0, power).astype(np.int32)


def mxfp8_scales(x: Array, block_size: int) -> Array:
    """UINT8 exponents + 127 of the blocks."""
    _, amax = _block_amax(x, block_size)
    return (mxfp8_exponents(amax)[..., 0] + 127).astype(np.uint8)


def mxfp8_values(x: Array, block_size: int) -> Array:
    """E4M3 values: x over its block's power of two, to nearest with ties to even."""
    wide, amax = _block_amax(x, block_size)
    wide = np.ldexp(wide, -mxfp8_exponents(amax))
    np.clip(wide, -E4M3_MAX, E4M3_MAX, out=wide)
    return wide.astype(ml_dtypes.float8_e4m3fn).reshape(x.shape)


def subtract_product(x: Array, left: Array, right: Array) -> Array:
    """x - left @ right, the product in float64: any implementation then rounds it to the same float32."""
    product = left.astype(np.float64) @ right.astype(np.float64)
    return (x.astype(np.float64) - product).astype(np.float32).astype(x.dtype)


BLOCK_KERNELS: dict[str, tuple[Callable[..., Array], tuple[str, ...]]] = {
    "nvfp4_scales": (nvfp4_scales, ("scale",)),
    "nvfp4_values": (nvfp4_values, ("scale",)),
    "mxfp8_scales": (mxfp8_scales, ()),
    "mxfp8_values": (mxfp8_values, ()),
    "subtract_product": (subtract_product, ("left", "right")),
}
"""Name of the operation -> its function, and which of its arguments are recipes."""


def plain_arguments(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are numbers."""
    return {name: value for name, value in args.items() if isinstance(value, (int, float))}
