"""Shape ranges: what `--profile batch=1:2:4,height=512:1024:2048` means for a model, and the default range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from diffc.errors import UsageError
from diffc.models.family import Family
from diffc.models.spec import VAE_SCALE, Shape


@dataclass(frozen=True)
class ShapeProfile:
    """The smallest, the usual and the largest shape that an engine is built for."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    @property
    def batch(self) -> int | None:
        """The batch size where it is fixed; None for a range."""
        return self.minimum.batch if self.minimum.batch == self.maximum.batch else None

    def __str__(self) -> str:
        return f"{self.minimum} | {self.optimum} | {self.maximum}"


def default_profile(family: Family, config: Mapping[str, Any]) -> ShapeProfile:
    """Half to 1.5 times the native image size, one to twice the usual batch, short to double prompts."""
    native, step = family.native(config), family.pixel_multiple(config)
    largest = {dim.name: dim.maximum for dim in family.dims(config)}

    def pixels(name: str, factor: float) -> int:
        wanted = int(getattr(native, name) * factor) // step * step
        rows = largest.get(name)
        return max(step, wanted if rows is None else min(wanted, rows * VAE_SCALE))

    minimum = Shape(1, pixels("height", 0.5), pixels("width", 0.5), max(1, native.text // 4))
    maximum = Shape(2 * native.batch, pixels("height", 1.5), pixels("width", 1.5), 2 * native.text)
    return ShapeProfile(minimum, native, maximum)


def parse_profile(text: str, family: Family, config: Mapping[str, Any]) -> ShapeProfile:
    """The default profile with the axes of `text` replaced: `axis=size` or `axis=min:opt:max`, comma separated.

    Axes are batch, height, width (pixels) and text (tokens). Raises UsageError for anything else, for sizes out
    of order, and for shapes that the model cannot run.
    """
    profile = default_profile(family, config)
    sizes = parse_sizes(text, [field.name for field in fields(Shape)])
    for axis, (low, middle, high) in sizes.items():
        profile = ShapeProfile(
            replace(profile.minimum, **{axis: low}),
            replace(profile.optimum, **{axis: middle}),
            replace(profile.maximum, **{axis: high}),
        )
    for shape in (profile.minimum, profile.optimum, profile.maximum):
        family.check(config, shape)
    return profile


def parse_sizes(text: str, known: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Minimum, optimum and maximum by axis, from `axis=size` or `axis=min:opt:max`, comma separated.

    Raises UsageError for an axis that is not `known`, and for sizes out of order.
    """
    sizes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, value = part.partition("=")
        if axis not in known:
            raise UsageError(f"profile {part!r}: unknown axis {axis!r}. Known: {', '.join(known) or 'none'}")
        sizes[axis] = _sizes(part, value)
    return sizes


def _sizes(part: str, value: str) -> tuple[int, int, int]:
    try:
        sizes = [int(n) for n in value.split(":")]
    except ValueError:
        sizes = []
    if len(sizes) == 1:
        sizes *= 3
    if len(sizes) != 3 or sizes != sorted(sizes):
        axis = part.partition("=")[0]
        raise UsageError(
            f"profile {part!r}: {value!r} is not a size, nor three in ascending order",
            fix=f"write {axis}=SIZE or {axis}=MIN:OPT:MAX",
        )
    return sizes[0], sizes[1], sizes[2]
