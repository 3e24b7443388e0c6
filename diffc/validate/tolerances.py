"""How far a compiled model may be from the model it was compiled from: one table, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping

from diffc.errors import unknown

MAX_REL_L2: Mapping[tuple[str, str], float] = {
    # The same arithmetic in another order of summation: float32 rounding (6e-8) over some hundred layers, 4e-7
    # measured. One percent on one weight matrix in the middle of a tiny model moves its output by 2e-5 and more.
    ("none", "float32"): 1e-5,
    # Rounding differences in front of a quantizer can move a value to the neighbouring quantization step. Few
    # values do: measured 6e-7 without a flip, up to 1e-3 with flips on tiny models.
    ("int8", "float32"): 2e-3,
    ("fp8", "float32"): 2e-3,
    # 11 significant bits: 5e-4 for each rounding, which happens between other operators than in torch.
    ("none", "float16"): 5e-3,
    # 8 significant bits: 4e-3 for each rounding.
    ("none", "bfloat16"): 2e-2,
    # 16-bit rounding makes flips of the quantizers common.
    ("int8", "float16"): 2e-2,
    ("fp8", "float16"): 2e-2,
    ("int8", "bfloat16"): 2e-2,
    ("fp8", "bfloat16"): 2e-2,
}
"""(format, compute type) -> largest ||reference - result|| / ||reference|| of any output."""


def tolerance_of(format_name: str, dtype: str) -> float:
    """The largest relative L2 error of a format in a compute type. Raises DiffcError that lists the known."""
    key = (format_name, dtype)
    if key not in MAX_REL_L2:
        raise unknown("format and type", "/".join(key), ["/".join(k) for k in MAX_REL_L2])
    return MAX_REL_L2[key]


SMOOTH_REL_L2 = 1e-5
"""Limit where activations are not rounded: float32 arithmetic in another order, in every format."""

PASS_REL_L2 = 1e-5
"""Change of an output that a pass with tolerance 0 may cause (smooth float32 twins before and after)."""
