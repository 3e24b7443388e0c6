"""Graph passes for diffusion backbones: ONNX in, ONNX out, without torch.

A pass named `fuse-rotary` is the class registered by the file `fuse_rotary.py`, in whichever folder it lies.
"""

from passes.base import Pass, PassCheckError, PassError, PassResult, Refusal, all_passes, find_pass, register
from passes.pipeline import Pipeline, PipelineResult

__all__ = [
    "Pass",
    "PassCheckError",
    "PassError",
    "PassResult",
    "Pipeline",
    "PipelineResult",
    "Refusal",
    "all_passes",
    "find_pass",
    "register",
]
