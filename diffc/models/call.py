"""How a pipeline of diffusers is called: which of its arguments exist, and which change sizes behind one's back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_OFF = {"use_resolution_binning": False, "complex_human_instruction": None, "clean_caption": False}
"""Arguments that change sizes or prompts: without them a size is what was asked for."""


_FRAMES = ("num_frames", "frames", "video_length")
"""What pipelines call the number of frames."""


def frames_argument(parameters: Mapping[str, Any]) -> str | None:
    """The name of the call's number of frames; None for pipelines of images."""
    return next((name for name in _FRAMES if name in parameters), None)


def parameters_of(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the call of a pipeline, or of its class."""
    cls = pipeline if isinstance(pipeline, type) else type(pipeline)
    return inspect.signature(cls.__call__).parameters


def plain_sizes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under which a pipeline takes sizes and prompts as they are, of those that it has."""
    return {name: value for name, value in _OFF.items() if name in parameters}
