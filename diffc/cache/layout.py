"""How a cached artifact is laid out: its layouts, and what is kept between its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["full+reduced", "segments"]
LAYOUTS: tuple[Layout, ...] = ("full+reduced", "segments")


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of a chain that steps without `group` use again.

    `source` None: the tensor itself is kept; else the tensor minus the tensor named `source`.
    """

    tensor: str
    group: int
    source: str | None
