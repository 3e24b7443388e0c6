"""The words in which a family describes its backbone: sizes that a user asks for, graph inputs, dynamic dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffc.models.nested import Path

Config = Mapping[str, Any]
"""A backbone's config.json."""

VAE_SCALE = 8
"""Pixels per latent row and column, in every family here."""


@dataclass(frozen=True)
class Shape:
    """What a user asks for: `batch` images of `height` x `width` pixels, conditioned on `text` tokens.

    `frames` is that of a video, 1 for images.
    """

    batch: int
    height: int
    width: int
    text: int
    frames: int = 1

    def __str__(self) -> str:
        frames = f"{self.frames} frames, " if self.frames > 1 else ""
        return f"batch {self.batch}, {self.height}x{self.width} px, {frames}{self.text} tokens"

    def described(self) -> dict[str, int]:
        """The axes by name; images have no frames."""
        return {name: size for name, size in asdict(self).items() if name != "frames" or size > 1}


Sample = Literal[
    "normal",
    "timestep",
    "sigma",
    "guidance",
    "image_ids",
    "text_ids",
    "time_ids",
    "mask",
    "seen",
    "size",
    "lengths",
]


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    `dims` mixes names of dynamic dimensions with ints. `dtype` is "model" (the compute type), or a type by name:
    positions and times stay float32, since 16-bit types cannot hold them exactly. `sample` says how random
    values for it are drawn; "seen" draws from `low` to `high`, "size" has no values: the call takes its length,
    and "lengths" are numbers of tokens in a list (`diffc.models.lists`).
    `bound` is a dimension whose size is above all values that are seen, which are numbers of its rows.
    `path` is the place in the arguments of forward(); default (name,).
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: Literal["model", "float32", "int64", "bool"] = "model"
    sample: Sample = "normal"
    path: Path = ()
    low: float = 0.0
    high: float = 1.0
    bound: str | None = None


@dataclass(frozen=True)
class DimSpec:
    """A dynamic dimension of the graph: a multiple of `multiple`, at most `maximum` (None: no limit)."""

    name: str
    multiple: int = 1
    maximum: int | None = None


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX file tells of a backbone: dimensions of the inputs by the family's names, and of the output.

    `weights` are the shapes of those initializers that have kept the names of their parameters.
    """

    inputs: Mapping[str, tuple[str | int, ...]]
    output: tuple[str | int, ...]
    weights: Mapping[str, tuple[int, ...]]

    def size(self, name: str, axis: int) -> int:
        """The fixed size of an axis of the input `name`. Raises LookupError where it is dynamic."""
        size = self.inputs[name][axis]
        if isinstance(size, str) or size < 1:
            raise LookupError(f"axis {axis} of {name} is dynamic, and it is a width of the model")
        return size

    def output_size(self, axis: int, otherwise: int) -> int:
        """The fixed size of an axis of the output, `otherwise` where it is dynamic."""
        size = self.output[axis] if axis < len(self.output) else 0
        return size if isinstance(size, int) and size > 0 else otherwise

    def weight(self, name: str, axis: int, otherwise: int) -> int:
        """The size of an axis of a weight, `otherwise` where the file has no weight of that name."""
        shape = self.weights.get(name, ())
        return shape[axis] if axis < len(shape) else otherwise


def latent_sizes(shape: Shape) -> dict[str, int]:
    """`Family.sizes` of backbones that take images as rows and columns of latents."""
    return {
        "batch": shape.batch,
        "height": shape.height // VAE_SCALE,
        "width": shape.width // VAE_SCALE,
        "text": shape.text,
    }
