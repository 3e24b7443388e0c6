"""Compute capabilities: which there are, and which element types and formats their kernels have.

Nothing heavy is imported here: the command line reads these tables before any work begins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from diffc.errors import UnsupportedError, unknown_value
from diffc.quantize.formats import FORMATS

KNOWN_SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that the TensorRT-RTX 1.7 builder has names for (its `ComputeCapability`)."""

CARDS: Mapping[int, str] = {
    75: "RTX 20, T4",
    80: "A100",
    86: "RTX 30, A10",
    89: "RTX 40, L40",
    90: "H100, H200",
    120: "RTX 50",
    121: "DGX Spark",
}
"""Well-known GPUs of a compute capability, by the series' names (developer.nvidia.com/cuda-gpus)."""

# onnx.TensorProto element type -> what people call it, and the oldest SM whose kernels have it, None where no
# builder reads it. Measured by tools/compat and held against its compat.json by a test: "Cannot compile for
# target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3". The numbers are onnx.TensorProto's,
# so that reading this table does not import onnx.
_TYPE_MIN_SM: Mapping[int, tuple[str, int | None]] = {
    16: ("BFLOAT16", 80),
    22: ("INT4", 80),
    17: ("FP8 (FLOAT8E4M3FN)", 89),
    24: ("MXFP8 scales (FLOAT8E8M0)", 89),
    23: ("FP4 (FLOAT4E2M1)", 120),
    4: ("UINT16", None),
    5: ("INT16", None),
    12: ("UINT32", None),
    13: ("UINT64", None),
    18: ("FLOAT8E4M3FNUZ", None),
    19: ("FLOAT8E5M2", None),
    20: ("FLOAT8E5M2FNUZ", None),
    21: ("UINT4", None),
    25: ("UINT2", None),
    26: ("INT2", None),
}
_ANY = (KNOWN_SMS[0], "")


def with_cards(sm: int) -> str:
    """A compute capability for people: "SM89 (RTX 40, L40)"."""
    return f"SM{sm} ({CARDS[sm]})" if sm in CARDS else f"SM{sm}"


def parse_sm(text: str) -> int:
    """A compute capability from "89", "sm89" or "8.9". Raises DiffcError that lists the known ones."""
    digits = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isascii() or not digits.isdigit() or int(digits) not in KNOWN_SMS:
        known, cards = [str(sm) for sm in KNOWN_SMS], ", ".join(map(with_cards, KNOWN_SMS))
        fix = f"give that of your card: {cards}"
        if digits in (str(sm) for sm in CARDS):
            fix = f"use --target ort-cuda for {CARDS[int(digits)]}, which TensorRT-RTX has no kernels for"
        raise unknown_value("compute capability", text, known, fix=fix)
    return int(digits)


def required_sm(element_types: Iterable[int]) -> tuple[int, str]:
    """The oldest compute capability that has all these onnx.TensorProto types, and the type that decides it.

    The name is empty when every known compute capability has them. Types that none has are left out.
    """
    rows = [_TYPE_MIN_SM.get(int(t), ("", _ANY[0])) for t in element_types]
    return max(((sm, name) for name, sm in rows if sm is not None), default=_ANY)


def check_sms(model_types: Collection[int], sms: Collection[int]) -> None:
    """Raise UnsupportedError when one of `sms` lacks a type of the model, before anything is built."""
    rows = [_TYPE_MIN_SM.get(int(t), ("", _ANY[0])) for t in model_types]
    unread = sorted(name for name, sm in rows if sm is None)
    if sms and unread:
        raise UnsupportedError(
            f"the model holds {', '.join(unread)}, which the compiler cannot read",
            fix="quantize to INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1, and cast other integers to INT32",
        )
    minimum, name = required_sm(model_types)
    _check(f"the model holds {name}", minimum, sms)


def check_format_sms(format_name: str, min_sm: int, sms: Iterable[int]) -> None:
    """Raise UnsupportedError when one of `sms` cannot run a format that exists from `min_sm` on."""
    _check(f"format {format_name!r} was asked for", min_sm, sms)


def _check(why: str, minimum: int, sms: Iterable[int]) -> None:
    old = sorted(sm for sm in set(sms) if sm < minimum)
    if not old:
        return
    names = ", ".join(f"SM{sm}" for sm in old)
    fit = ", ".join(f.name for f in FORMATS.values() if f.min_sm <= old[0])
    raise UnsupportedError(
        f"{why}, which needs SM{minimum} or newer; too old: {names}. Formats that run there: {fit}",
        fix=f"leave out {' '.join(f'--sm {sm}' for sm in old)}, or choose another type or --format",
    )
