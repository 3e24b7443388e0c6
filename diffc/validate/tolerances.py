"""How far a compiled model may differ from the model that it was compiled from: one table, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping

from diffc.errors import unknown
from diffc.quantize.formats import FORMATS, MIXED, Format

_BY_ROUNDING: Mapping[str, Mapping[str, float]] = {
    # The same arithmetic in another order of summation: float32 rounding (6e-8) over some hundred layers, 4e-7
    # measured. One percent on one weight matrix in the middle of a tiny model moves its output by 2e-5 and more.
    # 16-bit types have 11 and 8 significant bits: 5e-4 and 4e-3 for each rounding, between other operators than
    # in torch. Formats that quantize weights only belong here: their weights are the same on both sides.
    "no activation": {"float32": 1e-5, "float16": 5e-3, "bfloat16": 2e-2},
    # A rounding difference before a quantizer can move a value to the neighbouring step. In float32 few values move:
    # measured 6e-7 when none does, up to 1e-3 when some do (tiny models). 16-bit rounding moves many.
    "8 bits": {"float32": 2e-3, "float16": 2e-2, "bfloat16": 2e-2},
    # A step of E2M1 is up to half of the value.
    "4 bits": {"float32": 5e-3, "float16": 5e-2, "bfloat16": 5e-2},
}


def _rounding(fmt: Format) -> str:
    """The row of the table: only the rounding of activations can differ between two runs of a format."""
    return "no activation" if fmt.input_bits is None else f"{fmt.input_bits} bits"


MAX_REL_L2: Mapping[tuple[str, str], float] = {
    (fmt.name, dtype): limit
    for fmt in (*FORMATS.values(), MIXED)
    for dtype, limit in _BY_ROUNDING[_rounding(fmt)].items()
}
"""(format, compute type) -> largest ||reference - result|| / ||reference|| of any output."""


def tolerance_of(format_name: str, dtype: str) -> float:
    """The largest relative L2 error of a format in a compute type. Raises DiffcError for an unknown pair."""
    key = (format_name, dtype)
    if key not in MAX_REL_L2:
        raise unknown("format and type", "/".join(key), ["/".join(k) for k in MAX_REL_L2])
    return MAX_REL_L2[key]


def default_options_tolerance(format_name: str, dtype: str) -> float:
    """`tolerance_of` for ONNX Runtime's default options, under which it computes some operators in another way.

    A 16-bit product with INT4 weights becomes one operator (MatMulNBits) that sums in 16 bits: 7.4e-3 measured on
    tiny-sd3, where the graph's own operators give 2.7e-4.
    """
    limit = tolerance_of(format_name, dtype)
    return _BY_ROUNDING["8 bits"][dtype] if format_name == "int4_awq" and dtype != "float32" else limit


UNROUNDED_REL_L2 = 1e-5
"""Limit where activations are not rounded, in every format: float32 arithmetic in another order."""

PASS_REL_L2 = 1e-5
"""How far a pass with tolerance 0 may change an output, between the unrounded copies before and after it."""

MODULE_REL_L2 = 1e-4
"""Limit of a module by itself, fed what the reference gives before it (`diffc validate --bisect`).

Most modules agree to 3e-7. Sine and cosine of a timestep near 1000 agree to 3e-5: a float32 has no more digits there.
"""
