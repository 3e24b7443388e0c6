"""A model family as data: the backbone's inputs, outputs, dynamic axes and what stays unquantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]
"""A backbone's config.json."""


@dataclass(frozen=True)
class Axis:
    """A dynamic axis: how sizes that a user speaks of (batch, pixels, tokens) become a dimension.

    A dimension is a product of axes: "batch", "height" (latent rows), "height*width/4" (FLUX tokens).
    """

    name: str  # "batch", "height", "width", "text"
    minimum: int
    multiple: int = 1  # the latent height of SD3 must be a multiple of its patch size


@dataclass(frozen=True)
class InputSpec:
    """One graph input. `dims` mixes axis names, expressions of them, and ints.

    `dtype` is "model" (the compute type), "float32" or "int64". `path` is the keyword of forward(), or two
    of them for a nested one (`added_cond_kwargs`, `text_embeds`).
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: str = "model"
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelSpec:
    """A family: everything about it that is not a tensor."""

    family: str
    backbone_class: str  # diffusers class name, as `_class_name` in config.json
    component: str  # "transformer" or "unet" in a pipeline folder
    inputs: Callable[[Config], tuple[InputSpec, ...]]
    output: str  # the name optimum expects
    axes: Callable[[Config], tuple[Axis, ...]]
    unquantized: str  # regex on module paths, matched from the start
    opt_text: int  # tokens of the pipeline's own prompts
    calibration: Mapping[str, Any]  # keyword arguments of the pipeline call
