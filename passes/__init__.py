"""Graph passes for diffusion backbones: ONNX in, ONNX out, without torch.

A pass named `fuse-rotary` is the class registered by the file `fuse_rotary.py`, in whichever folder it lies.
The names below are imported when they are first used, so that a part such as `passes.plugins` costs no onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.base import Pass as Pass
    from passes.base import PassCheckError as PassCheckError
    from passes.base import PassError as PassError
    from passes.base import PassResult as PassResult
    from passes.base import Refusal as Refusal
    from passes.base import all_passes as all_passes
    from passes.base import find_pass as find_pass
    from passes.base import register as register
    from passes.pipeline import Pipeline as Pipeline
    from passes.pipeline import PipelineResult as PipelineResult

_BASE = (
    "Pass",
    "PassCheckError",
    "PassError",
    "PassResult",
    "Refusal",
    "all_passes",
    "find_pass",
    "register",
)
_PLACES = dict.fromkeys(_BASE, "passes.base") | dict.fromkeys(
    ("Pipeline", "PipelineResult"), "passes.pipeline"
)
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    """A public name, imported on its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module 'passes' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
