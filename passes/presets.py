"""The pass lists that `diffc compile` uses, each line with the reason for its place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from passes.base import Pass
from passes.canonical.fold_constants import FoldConstants
from passes.canonical.fold_weight_layout import FoldWeightLayout
from passes.canonical.fold_weight_qdq import FoldWeightQdq
from passes.canonical.fuse_qdq import FuseQdq
from passes.canonical.inline_functions import InlineFunctions
from passes.canonical.name_dimensions import NameDimensions
from passes.canonical.remove_unused import RemoveUnused
from passes.canonical.split_sequences import SplitSequences
from passes.importing.cast_unsupported import CastUnsupported
from passes.importing.fold_int4_weights import FoldInt4Weights
from passes.importing.match_types import MatchTypes
from passes.importing.normalize_qdq import NormalizeQdq
from passes.importing.rewrite_opset import RewriteOpset
from passes.targets.ort.add_trt_functions import AddTrtFunctions
from passes.targets.ort.emulate_fp4 import EmulateFp4
from passes.targets.ort.guard_slices import GuardSlices
from passes.targets.ort_cuda.flatten_attention import FlattenAttention
from passes.targets.ort_cuda.fold_gates import FoldGates
from passes.targets.ort_cuda.fold_value_bias import FoldValueBias
from passes.targets.ort_cuda.fuse_adaptive_norm import FuseAdaptiveNorm
from passes.targets.ort_cuda.fuse_bias_gelu import FuseBiasGelu
from passes.targets.ort_cuda.fuse_residual import FuseResidual
from passes.targets.ort_cuda.fuse_rms_norm import FuseRmsNorm
from passes.targets.ort_cuda.fuse_rotary import FuseRotary
from passes.targets.ort_cuda.fuse_shared_norm import FuseSharedNorm
from passes.targets.ort_cuda.fuse_skip_norm import FuseSkipNorm
from passes.targets.ort_cuda.join_slices import JoinSlices
from passes.targets.ort_cuda.keep_float32 import KeepFloat32
from passes.targets.ort_cuda.lift_bias import LiftBias
from passes.targets.ort_cuda.merge_modulations import MergeModulations
from passes.targets.ort_cuda.merge_projections import MergeProjections
from passes.targets.ort_cuda.merge_row_products import MergeRowProducts
from passes.targets.ort_cuda.rewrite_patches import RewritePatches
from passes.targets.tensorrt.add_zero_bias import AddZeroBias
from passes.targets.tensorrt.decompose_attention import DecomposeAttention
from passes.targets.tensorrt.fold_scale_cast import FoldScaleCast
from passes.targets.tensorrt.quantize_softmax import QuantizeSoftmax
from passes.targets.tensorrt.type_trt_ops import TypeTrtOps

# What every traced model gets, whatever the target.
CANONICAL: tuple[Pass, ...] = (
    FoldConstants(),  # first: the others match on inline constants, not on Constant nodes and Shape chains
    SplitSequences(),  # needs the constant indices that folding made; the pieces are plain tensors then
    FoldWeightQdq(),  # before the layout: it looks for the QuantizeLinear that sits directly on the weight
    FoldWeightLayout(),  # after it: Transpose moves through the DequantizeLinear that is left
    RemoveUnused(),  # last: drops the scales, shapes and weights that nothing reads any more
)

# What an ONNX file from ModelOpt's scripts gets to reach the canonical form. It may be no valid ONNX at first.
IMPORT: tuple[Pass, ...] = (
    InlineFunctions(),  # first: the others see what functions hold only where it is called
    NameDimensions(),  # before all that reads shapes; a profile can name what is dynamic
    FoldConstants(),  # the scales of ModelOpt are Constant nodes, the shapes around INT4 weights chains of them
    FoldInt4Weights(),  # before normalize-qdq, which cannot say what a dequantized float weight means
    NormalizeQdq(),  # standard quantizers wherever ONNX has them
    FoldWeightQdq(),  # before match-types: weights are rounded by the scale as it is, not as the compute type has it
    MatchTypes(),  # before rewrite-opset, which needs types; from here on ONNX's own inference works
    CastUnsupported(),  # after match-types, which finds the types; before rewrite-opset, which refuses wrong ones
    RewriteOpset(),  # blocks need opset 21, FLOAT4E2M1 23
    InlineFunctions(),  # after rewrite-opset: functions that were of another opset than the model
    FoldConstants(),  # casts that match-types made pointless, and shapes that are static now that types are known
    SplitSequences(),  # the legacy exporter writes sequences
    FoldWeightLayout(),  # as in CANONICAL
    RemoveUnused(),  # as in CANONICAL
    TypeTrtOps(),  # last: ONNX knows no shapes of what TensorRT's operators give
)
# What the file that `diffc import` writes gets besides: whoever opens it may do so with ONNX Runtime's defaults.
IMPORT_FILE: tuple[Pass, ...] = (*IMPORT, GuardSlices())

# What every target wants of quantizers; exact.
_FUSED: tuple[Pass, ...] = (
    FuseQdq(),  # a tensor is quantized once, right where the kernels are that take it in
    RemoveUnused(),  # what merging left without readers
)
_TENSORRT: tuple[Pass, ...] = (
    *_FUSED,
    DecomposeAttention(),  # the compiler has no float32 kernel and none above 256 (16-bit stays one node)
    AddZeroBias(),  # after fuse-qdq, which lets layers share their quantized input
    FoldConstants(),  # the causal mask and the shapes that decomposing adds are often static
    FoldScaleCast(),  # after all that match a DequantizeLinear by its types
    RemoveUnused(),  # what folding left, and the doubled scales and axes of many attention layers
    TypeTrtOps(),  # last: what is typed must not change any more
)
_PLAIN: tuple[Pass, ...] = (
    EmulateFp4(),  # ONNX Runtime's own providers have no FP4; FP8 holds its values exactly
    AddTrtFunctions(),  # after it, since the bodies give the type that the values have by now
    TypeTrtOps(),  # last: types of what the functions give
)
# What ONNX Runtime's CUDA kernels do in one and its optimizer does not find; docs/benchmarks.md has the figures.
_CUDA: tuple[Pass, ...] = (
    RewritePatches(),  # before lift-bias: makes a sum with a bias, which lift-bias may move
    FuseRmsNorm(),  # before flatten-attention, which moves norms as one node
    FuseAdaptiveNorm(),  # a norm of which each row is scaled and shifted
    FuseRotary(),  # a rotation of queries or keys
    JoinSlices(),  # a stream that is cut and joined again
    FlattenAttention(multi_head=True),  # after fuse-rms-norm, see there
    RemoveUnused(),  # transposes and plain norms, so that what is left says who reads what
    FoldValueBias(),  # before fuse-skip-norm, which absorbs the bias of the output projection
    FoldGates(),  # after fold-value-bias: needs the final biases; before fuse-skip-norm: absorbs gated biases
    FuseSkipNorm(),  # fires where fix-size has made the batch a number
    FuseSharedNorm(),  # after fuse-skip-norm: takes the norms that are left
    FuseResidual(),  # after both: takes the sums that no norm absorbed
    FuseBiasGelu(),  # before lift-bias: absorbs the bias of a Gelu
    MergeProjections(),  # after fold-value-bias, which needs each projection by itself
    LiftBias(),  # after all that absorb a bias of one axis
    MergeModulations(),  # after fuse-skip-norm, which cuts modulations by image
    MergeRowProducts(),  # after merge-modulations, which cuts rows of all images at once
    KeepFloat32(),  # after all that need biases as constants
    RemoveUnused(),  # last: what others have absorbed
)

# What a target asks for on top of the canonical form.
TARGETS: dict[str, tuple[Pass, ...]] = {
    "trt-rtx": _TENSORRT,
    "tensorrt": _TENSORRT,
    "ort": (*_FUSED, GuardSlices(), *_PLAIN),  # guarded: the file opens with ONNX Runtime's default options
    "ort-cuda": (*_FUSED, *_CUDA, *_PLAIN),
    "ort-trt-rtx": _TENSORRT,  # TensorRT-RTX inside ONNX Runtime, which cannot infer what TensorRT's operators give
}
_HAS_FP8_ATTENTION = ("trt-rtx", "tensorrt", "ort-trt-rtx")


@dataclass(frozen=True)
class TargetOptions:
    """What the passes of a target are told about the model.

    `quantized_attention`: attention computes in FP8. `tokens`: how many tokens an image has at the sizes that the model
    is made fast for (for fold-gates and fuse-skip-norm). `across_blocks`: run merge-modulations, which joins weights of
    several blocks; models that share blocks with other models would store the joined weights again.
    """

    quantized_attention: bool = False
    tokens: int = 0
    across_blocks: bool = True


DEFAULT_OPTIONS = TargetOptions()


def target_passes(target: str, options: TargetOptions = DEFAULT_OPTIONS) -> tuple[Pass, ...]:
    """The passes of `target`; with FP8 attention, in the form that TensorRT has a kernel for (changes numbers)."""
    steps = tuple(
        replace(step, tokens=options.tokens) if isinstance(step, (FoldGates, FuseSkipNorm)) else step
        for step in TARGETS[target]
        if options.across_blocks or not isinstance(step, MergeModulations)
    )
    if options.quantized_attention and target in _HAS_FP8_ATTENTION:
        # First: it wants q, k and v as they are traced, with their quantizers right at the attention.
        return (QuantizeSoftmax(), *steps)
    return steps
