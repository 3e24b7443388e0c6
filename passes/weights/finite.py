"""Whether the values of a weight are numbers: NaN and infinity are found when it is read, with its name."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from passes.base import PassError
from passes.weights.recipe import Array, Source

_PIECE = 1 << 20
_INFINITY: dict[np.dtype[Any], tuple[type[np.unsignedinteger[Any]], int]] = {
    np.dtype(np.float64): (np.uint64, 0x7FF0_0000_0000_0000),
    np.dtype(np.float32): (np.uint32, 0x7F80_0000),
    np.dtype(np.float16): (np.uint16, 0x7C00),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, 0x7C),
    np.dtype(ml_dtypes.float8_e4m3fn): (
        np.uint8,
        0x7E,
    ),  # it has no infinity, and one NaN after its largest number
}
"""The bits of infinity without the sign (IEEE 754): greater ones are NaN."""
_NO_INFINITY = np.dtype(ml_dtypes.float8_e4m3fn)


def check_finite(array: Array, source: Source) -> None:
    """Raise PassError that names the tensor of `source` when its values, `array`, hold NaN or infinity.

    A mask may: minus infinity beside one other value. Types without either are not looked at.
    """
    if array.dtype not in _INFINITY or array.size == 0:
        return
    kind, infinity = _INFINITY[array.dtype]
    largest = _largest(np.ascontiguousarray(array).reshape(-1).view(kind))
    wrong = "NaN" if largest > infinity else "infinity" if largest == infinity else ""
    if not wrong or (wrong == "infinity" and (array.dtype == _NO_INFINITY or _is_mask(array))):
        return
    place = f" of {source.path}" if source.path else ""
    raise PassError(
        f"the weight {source.key!r}{place} holds {wrong}: it is damaged, or its training has diverged."
        " Fix: download or export the model again"
        if source.kind == "raw"
        else f"a weight inside the model, {list(source.shape)}, holds {wrong}. Fix: export the model again"
    )


def _largest(bits: Array) -> int:
    """The largest of all values without their signs."""
    mask = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return max(int((bits[i : i + _PIECE] & mask).max()) for i in range(0, bits.size, _PIECE))


def _is_mask(array: Array) -> bool:
    """Whether there are one finite value and minus infinity: additive masks are 0 and that."""
    finite = array[np.isfinite(array)]
    return bool(finite.size and finite.min() == finite.max() and not (array > finite.max()).any())
