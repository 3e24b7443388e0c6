"""How a pipeline of diffusers is called: which of its arguments exist, and which change sizes behind one's back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

_OFF = {
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    "clean_caption": False,
    "enable_prompt_rewrite": False,
    "use_pe": False,
}
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


@contextmanager
def text_cleaner(pipeline: Any) -> Iterator[None]:
    """ftfy for a pipeline class that calls it where it is not installed: it repairs broken letters, of which a prompt
    that was typed has none.
    """
    module = sys.modules[pipeline.__module__]
    if hasattr(module, "ftfy"):
        yield
        return
    with patch.object(module, "ftfy", SimpleNamespace(fix_text=lambda text: text), create=True):
        yield


def plain_sizes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments under which a pipeline takes sizes and prompts as they are, of those that it has."""
    return {name: value for name, value in _OFF.items() if name in parameters}
