"""Shape ranges: what `--profile batch=1:2:4,height=512:1024:2048` means for a model, and the default range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from math import isqrt
from pathlib import Path
from typing import Any

from diffc.errors import UnsupportedError, UsageError
from diffc.models.family import Family
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import read_json
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

    @classmethod
    def of_manifest(cls, stated: Mapping[str, Mapping[str, int]]) -> ShapeProfile:
        """The profile that a manifest.json holds under "profile"."""
        return cls(*(Shape(**stated[name]) for name in ("minimum", "optimum", "maximum")))

    def described(self) -> dict[str, dict[str, int]]:
        """The profile as `of_manifest` reads it."""
        return {name: getattr(self, name).described() for name in ("minimum", "optimum", "maximum")}

    def holds(self, shape: Shape) -> bool:
        """Whether every axis of `shape` lies between the smallest and the largest shape."""
        rows = zip(astuple(self.minimum), astuple(shape), astuple(self.maximum), strict=True)
        return all(low <= size <= high for low, size, high in rows)

    def __str__(self) -> str:
        return f"{self.minimum} | {self.optimum} | {self.maximum}"


def painted_size(pipeline: Path | None) -> int | None:
    """Height and width, in pixels, that the VAE of a pipeline folder is made for; None where no VAE tells it.

    Raises DiffcError when vae/config.json is there and cannot be read.
    """
    if pipeline is None or not (pipeline / "vae" / "config.json").is_file():
        return None
    size = read_json(inside(pipeline, "vae") / "config.json").get("sample_size")
    return size if isinstance(size, int) and size > 0 else None


def native_shape(family: Family, config: Mapping[str, Any], painted: int | None = None) -> Shape:
    """The shape that a pipeline paints by default.

    A backbone whose config.json has no `sample_size` (FLUX) does not tell its image size: there `painted`, the size
    of the pipeline's VAE, decides. Without a pipeline it is the size that the family was trained for.
    """
    native, step = family.native(config), family.pixel_multiple(config)
    if painted is None or "sample_size" in config:
        return native
    size = max(step, painted // step * step)
    return replace(native, height=size, width=size)


def default_profile(family: Family, config: Mapping[str, Any], painted: int | None = None) -> ShapeProfile:
    """Half to 1.5 times the image size, one to twice the usual batch, short to double prompts.

    The image size is that of `native_shape`. The range also holds `painted`, the size of the pipeline's VAE.
    """
    native, step = native_shape(family, config, painted), family.pixel_multiple(config)
    painted = painted or native.height
    largest = {dim.name: dim.maximum for dim in family.dims(config)}

    def pixels(name: str, factor: float) -> int:
        wanted = int(getattr(native, name) * factor) // step * step
        rows = largest.get(name)
        return max(step, wanted if rows is None else min(wanted, rows * VAE_SCALE))

    # A graph may tell of a largest image below the size for which models of its family are trained.
    native = replace(native, height=pixels("height", 1), width=pixels("width", 1))
    smallest, widest = min(0.5, painted / native.height), max(1.5, painted / native.height)
    few, many = _frames(family, native.frames)
    minimum = Shape(1, pixels("height", smallest), pixels("width", smallest), max(1, native.text // 4), few)
    maximum = Shape(
        2 * native.batch, pixels("height", widest), pixels("width", widest), 2 * native.text, many
    )
    return ShapeProfile(minimum, native, maximum)


def _frames(family: Family, native: int) -> tuple[int, int]:
    """The fewest and the most frames by default: half and 1.5 times the usual, in the steps of the family."""
    if family.frames is None:
        return 1, 1
    usual = (native - family.frames[1]) // family.frames[0]
    return family.video_frames(max(1, usual // 2)), family.video_frames(usual * 3 // 2)


def parse_profile(
    text: str, family: Family, config: Mapping[str, Any], painted: int | None = None
) -> ShapeProfile:
    """The default profile with the axes of `text` replaced: `axis=size` or `axis=min:opt:max`, comma separated.

    Axes are batch, height, width (pixels), text (tokens) and, for videos, frames. Raises UsageError for anything
    else, for sizes out of order, and for shapes that the model cannot run.
    """
    profile = default_profile(family, config, painted)
    sizes = parse_sizes(text, [f.name for f in fields(Shape) if f.name != "frames" or family.frames])
    for axis, (low, middle, high) in sizes.items():
        profile = ShapeProfile(
            replace(profile.minimum, **{axis: low}),
            replace(profile.optimum, **{axis: middle}),
            replace(profile.maximum, **{axis: high}),
        )
    for shape in (profile.minimum, profile.optimum, profile.maximum):
        family.check(config, shape)
    return profile


def profile_of_ranges(
    family: Family, config: Mapping[str, Any], ranges: Mapping[str, tuple[int, int, int]]
) -> ShapeProfile:
    """The profile of a graph whose dimensions have these ranges, by the family's names; defaults for the others.

    Raises UnsupportedError when no image has such sizes.
    """
    usual = default_profile(family, config)
    bounds = (usual.minimum, usual.optimum, usual.maximum)
    shapes = [
        shape_of(family, config, family.sizes(shape) | {name: sizes[i] for name, sizes in ranges.items()})
        for i, shape in enumerate(bounds)
    ]
    return ShapeProfile(*shapes)


def shape_of(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Shape:
    """The shape whose sizes of dynamic dimensions are these; images that are a row of tokens are nearly square.

    Raises UnsupportedError when no image has such sizes.
    """
    if "image" in sizes:
        rows = next(n for n in range(isqrt(sizes["image"]), 0, -1) if sizes["image"] % n == 0)
        cell = family.pixel_multiple(config)
        height, width = rows * cell, sizes["image"] // rows * cell
    else:
        height, width = sizes["height"] * VAE_SCALE, sizes["width"] * VAE_SCALE
    shape = Shape(sizes["batch"], height, width, sizes["text"])
    if family.sizes(shape) != dict(sizes):
        raise UnsupportedError(
            f"no image of {family} has the sizes {dict(sizes)}", fix="give sizes that an image has"
        )
    return shape


def parse_sizes(text: str, known: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Minimum, optimum and maximum by axis, from `axis=size` or `axis=min:opt:max`, comma separated.

    Raises UsageError for an axis that is not `known`, and for sizes out of order.
    """
    sizes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, value = part.partition("=")
        if axis not in known:
            raise UsageError(
                f"profile {part!r}: unknown axis {axis!r}. Known: {', '.join(known) or 'none'}",
                fix="name one of these",
            )
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
