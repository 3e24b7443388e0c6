"""How far a compiled model may be from the model it was compiled from: one table, with the reasons."""

from __future__ import annotations

from collections.abc import Mapping

from diffc.errors import unknown

MAX_REL_L2: Mapping[tuple[str, str], float] = {
    # The same arithmetic in another order of summation: float32 rounding (6e-8) over some hundred layers.
    ("none", "float32"): 1e-4,
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


PASS_NOISE: Mapping[str, float] = {
    # A pass that only moves or folds still lets ONNX Runtime sum in another order. Graphs are compared as
    # their float32 twins, whatever the compute type.
    "plain": 1e-4,
    # Behind such a rounding, a quantizer may put a value on the neighbouring step: one such flip in the first
    # block of a tiny model was measured to move its output by up to 1e-3.
    "quantized": 2e-3,
}
"""Relative L2 change of an output that a pass with tolerance 0 may cause, without and with quantizers."""
