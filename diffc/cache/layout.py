"""How a cached artifact is laid out: its layouts, what is kept between its models, and sizes of tensors as texts.

A size is written in terms of the graph's dynamic dimensions: "height*width/4", "text", "128", "text+image".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

Layout = Literal["full+reduced", "segments"]
LAYOUTS: tuple[Layout, ...] = ("full+reduced", "segments")

Sizes = Mapping[str, int]
"""The sizes of the graph's dynamic dimensions, by name."""
Dims = Mapping[str, tuple[str | int, ...]]
"""The size of every axis of some tensors, by the tensors' names."""


@dataclass(frozen=True)
class KeptTensor:
    """A tensor of a chain that steps without `group` use again.

    `source` None: the tensor itself is kept; else the tensor minus the tensor named `source`.
    """

    tensor: str
    group: int
    source: str | None


def size_of(text: str | int, sizes: Sizes) -> int:
    """The number that the size `text` stands for at the dimensions `sizes`."""
    if text in sizes:  # an imported graph may name a dimension "2*tokens"
        return sizes[str(text)]
    total = 0
    for term in str(text).split("+"):
        product, _, divisor = term.partition("/")
        factors = (sizes[part] if part in sizes else int(part) for part in product.split("*"))
        total += prod(factors) // int(divisor or 1)
    return total
