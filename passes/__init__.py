"""Graph passes for diffusion backbones: ONNX in, ONNX out, without torch."""

from passes import (
    decompose_attention,
    fold_constants,
    fold_weight_layout,
    fold_weight_qdq,
    fuse_qdq,
    quantize_softmax,
    remove_unused,
    rewrite_opset,
    share_scales,
    smooth_qdq,
    split_sequences,
    widen_types,
)
from passes.base import Pass, PassCheckError, PassError, PassResult, Refusal, all_passes
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
    "decompose_attention",
    "fold_constants",
    "fold_weight_layout",
    "fold_weight_qdq",
    "fuse_qdq",
    "quantize_softmax",
    "remove_unused",
    "rewrite_opset",
    "share_scales",
    "smooth_qdq",
    "split_sequences",
    "widen_types",
]
