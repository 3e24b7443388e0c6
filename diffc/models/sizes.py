"""Sizes of tensors as texts, in terms of a graph's dynamic dimensions: "height*width/4", "128", "text+image"."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

Sizes = Mapping[str, int]
"""The sizes of the graph's dynamic dimensions, by name."""
Dims = Mapping[str, tuple[str | int, ...]]
"""The size of every axis of some tensors, by the tensors' names."""


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
