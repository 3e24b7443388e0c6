"""A model family as data: the backbone's inputs, output, dynamic dimensions and what stays unquantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffc.errors import DiffcError

Config = Mapping[str, Any]
"""A backbone's config.json."""

VAE_SCALE = 8
"""Pixels per latent row and column, in every family here."""


@dataclass(frozen=True)
class Shape:
    """What a user asks for: `batch` images of `height` x `width` pixels, conditioned on `text` tokens."""

    batch: int
    height: int
    width: int
    text: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.height}x{self.width} px, {self.text} tokens"


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    `dims` mixes names of dynamic dimensions with ints. `dtype` is "model" (the compute type) or "float32":
    positions and times stay float32, since 16-bit types cannot hold them exactly. `sample` says how random
    values for it are drawn. `path` is the keyword of forward(), or two for a nested one; default (name,).
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: Literal["model", "float32"] = "model"
    sample: Literal["normal", "timestep", "sigma", "guidance", "image_ids", "text_ids", "time_ids"] = "normal"
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class DimSpec:
    """A dynamic dimension of the graph: a multiple of `multiple`, at most `maximum` (None: no limit)."""

    name: str
    multiple: int = 1
    maximum: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A family: everything about it that is not a tensor.

    `sizes` turns a Shape into the sizes of the graph's dynamic dimensions. `unquantized` is a regular
    expression matched from the start of a module path. `pixel_multiple` gives what height and width must be
    divisible by.
    """

    family: str
    backbone_class: str
    component: Literal["transformer", "unet"]
    inputs: Callable[[Config], tuple[InputSpec, ...]]
    output: str
    output_dims: Callable[[Config], tuple[str | int, ...]]
    dims: Callable[[Config], tuple[DimSpec, ...]]
    sizes: Callable[[Shape], dict[str, int]]
    pixel_multiple: Callable[[Config], int]
    native: Callable[[Config], Shape]
    unquantized: str
    calibration: Mapping[str, Any]

    def check(self, config: Config, shape: Shape) -> Shape:
        """`shape` itself. Raises DiffcError when this backbone cannot run it, and says what it can."""
        multiple = self.pixel_multiple(config)
        if min(shape.batch, shape.height, shape.width, shape.text) < 1:
            raise DiffcError(f"shape ({shape}) has a size below 1")
        for name in ("height", "width"):
            if getattr(shape, name) % multiple:
                raise DiffcError(
                    f"{name} {getattr(shape, name)} px does not fit {self.family}",
                    fix=f"use a multiple of {multiple}",
                )
        sizes = self.sizes(shape)
        for dim in self.dims(config):
            if dim.maximum is not None and sizes[dim.name] > dim.maximum:
                raise DiffcError(
                    f"{dim.name} is {sizes[dim.name]} at {shape}, and this model ends at {dim.maximum}",
                    fix="ask for a smaller image or fewer tokens",
                )
        return shape

    def input_shapes(self, config: Config, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The shape of every graph input at `shape`, in graph order."""
        sizes = self.sizes(shape)
        return {
            i.name: tuple(sizes[d] if isinstance(d, str) else d for d in i.dims) for i in self.inputs(config)
        }

    def tokens(self, config: Config, shape: Shape) -> int:
        """How many tokens the blocks of a transformer have for each image; of a UNet, those at its bottom."""
        multiple = self.pixel_multiple(config)
        return (shape.height // multiple) * (shape.width // multiple)


def latent_sizes(shape: Shape) -> dict[str, int]:
    """`ModelSpec.sizes` of backbones that take images as rows and columns of latents."""
    return {
        "batch": shape.batch,
        "height": shape.height // VAE_SCALE,
        "width": shape.width // VAE_SCALE,
        "text": shape.text,
    }
