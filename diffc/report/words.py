"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(nbytes: float | None) -> str:
    """Bytes as "2.1 MB"."""
    if nbytes is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} B"


def error(value: float | None) -> str:
    """A relative error as "4.7e-07"."""
    return "-" if value is None else f"{value:.1e}" if value else "0"


def seconds(value: float | None) -> str:
    """Seconds as "12.3 s", long times in minutes."""
    if value is None:
        return "-"
    return f"{value / 60:.1f} min" if value >= 120 else f"{value:.3g} s"


def count(number: float) -> str:
    """A number of parameters as "1.87 M"."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def scale(low: float | None, high: float | None) -> str:
    """The range of a scale: one number where both ends are the same."""
    if low is None or high is None:
        return "-"
    return f"{low:.2e}" if low == high else f"{low:.2e} to {high:.2e}"


def profile(stated: Any) -> str:
    """The shapes that an artifact is made for."""
    if isinstance(stated, Mapping) and "optimum" in stated:
        low, best, high = (stated[name] for name in ("minimum", "optimum", "maximum"))
        parts = (f"{axis} {_ends(low[axis], high[axis])} (best {best[axis]})" for axis in low)
        return ", ".join(parts)
    if isinstance(stated, list) and stated:
        inputs: Mapping[str, Any] = stated[0].get("inputs", {})
        return ", ".join(f"{name} {sizes[0]} to {sizes[-1]}" for name, sizes in inputs.items())
    return "-"


def _ends(low: Any, high: Any) -> str:
    return f"{low}" if low == high else f"{low} to {high}"
