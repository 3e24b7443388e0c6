"""The pass lists that `diffc compile` uses, each line with the reason for its place."""

from __future__ import annotations

from passes.base import Pass
from passes.decompose_attention import DecomposeAttention
from passes.fold_constants import FoldConstants
from passes.fold_weight_layout import FoldWeightLayout
from passes.fold_weight_qdq import FoldWeightQdq
from passes.remove_unused import RemoveUnused
from passes.split_sequences import SplitSequences

# What every traced model gets, whatever the target.
CANONICAL: tuple[Pass, ...] = (
    FoldConstants(),  # first: the others match on inline constants, not on Constant nodes and Shape chains
    SplitSequences(),  # needs the constant indices that folding made; the pieces are plain tensors then
    FoldWeightQdq(),  # before the layout: it looks for the QuantizeLinear that sits directly on the weight
    FoldWeightLayout(),  # after it: Transpose moves through the DequantizeLinear that is left
    RemoveUnused(),  # last: drops the scales, shapes and weights that nothing reads any more
)

# What a target asks for on top of the canonical form.
TARGETS: dict[str, tuple[Pass, ...]] = {
    "trt-rtx": (
        DecomposeAttention(),  # the compiler has no float32 kernel and none above 256 (16-bit stays one node)
        FoldConstants(),  # the causal mask and the shapes that decomposing adds are often static
        RemoveUnused(),  # what folding left, and the doubled scales and axes of many attention layers
    ),
    "ort": (),  # ONNX Runtime on CPU runs the canonical form as it is
}
