"""The quantization formats: one small declaration each, in the terms of ModelOpt's quantizer attributes.

Nothing here imports torch or modelopt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffc import plugins
from diffc.errors import unknown_value
from diffc.quantize.kinds import KINDS, block_size_of, kind_of

Quantizer = Mapping[str, Any]
"""Attributes of one ModelOpt TensorQuantizer: num_bits, axis, block_sizes (`QuantizerAttributeConfig`)."""

INT8: Quantizer = {**KINDS["int8"].attributes, "axis": None}
INT8_CHANNEL: Quantizer = {**KINDS["int8"].attributes, "axis": 0}
FP8: Quantizer = {**KINDS["fp8"].attributes, "axis": None}
INT4_BLOCK: Quantizer = KINDS["int4"].attributes
NVFP4: Quantizer = KINDS["nvfp4"].attributes
NVFP4_FOUR_SIX: Quantizer = KINDS["nvfp4_four_six"].attributes
MXFP8: Quantizer = KINDS["mxfp8"].attributes


@dataclass(frozen=True)
class Format:
    """A format as data.

    `weight` lists what the weight goes through in order (w4a8: INT4 blocks, then FP8); empty for a format that
    quantizes nothing. `input` is the activation's quantizer, None where it stays in the model's type. `layers`:
    "all" linear layers and convolutions, or only the "linear" ones (no block format has convolutions).
    `algorithm` is ModelOpt's calibration method, None where nothing is calibrated. `mha`: whether attention can
    run in FP8 beside it (--quantize-mha). `min_sm` is the lowest compute capability, major * 10 + minor, and
    `evidence` says why it begins there.
    """

    name: str
    summary: str
    weight: tuple[Quantizer, ...]
    input: Quantizer | None
    layers: Literal["all", "linear"]
    algorithm: Literal["max", "smoothquant", "awq_lite", "svdquant"] | None
    min_sm: int
    evidence: str
    mha: bool = False

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized."""
        return bool(self.weight)

    @property
    def block_size(self) -> int | None:
        """Elements of a weight that share a scale; None where it is a whole channel or tensor."""
        return block_size_of(self.weight[0]) if self.weight else None

    @property
    def weight_bits(self) -> int | None:
        """Bits of a stored weight, without its scales; None where it stays in the model's own type."""
        return kind_of(self.weight[0]).bits if self.weight else None

    @property
    def input_bits(self) -> int | None:
        """Bits of a quantized activation; None where it stays in the model's own type."""
        return None if self.input is None else kind_of(self.input).bits

    @property
    def stored_bits(self) -> float | None:
        """Bits of a stored weight with its share of the block scales."""
        if not self.weight:
            return None
        kind, block = kind_of(self.weight[0]), self.block_size
        return kind.bits if block is None else kind.bits + (kind.scale_bits or 0) / block


_ANY_GPU = "integer kernels are in every GPU that TensorRT-RTX builds for"
_HAS_INT4 = "the builder: model contains HW-specific datatypes: int4 (SM75)"
_HAS_FP8 = "the builder: model contains HW-specific datatypes: fp8_e4m3 (SM86)"
_HAS_FP4 = "the builder: model contains HW-specific datatypes: fp4_e2m1 (SM89)"

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format(
            name="none",
            summary="weights and activations in the model's own type",
            weight=(),
            input=None,
            layers="all",
            algorithm=None,
            min_sm=75,
            evidence="nothing is quantized",
        ),
        Format(
            name="int8",
            summary="8-bit integers: weights per channel, inputs per tensor",
            weight=(INT8_CHANNEL,),
            input=INT8,
            layers="all",
            algorithm="max",
            min_sm=75,
            evidence=_ANY_GPU,
        ),
        Format(
            name="int8_smoothquant",
            summary="int8, with outliers moved from inputs into weights by --alpha",
            weight=(INT8_CHANNEL,),
            input=INT8,
            layers="all",
            algorithm="smoothquant",
            min_sm=75,
            evidence=_ANY_GPU,
        ),
        Format(
            name="fp8",
            summary="8-bit floats (E4M3), weights and inputs per tensor",
            weight=(FP8,),
            input=FP8,
            layers="all",
            algorithm="max",
            min_sm=89,
            evidence=_HAS_FP8,
            mha=True,
        ),
        Format(
            name="int4_awq",
            summary="4-bit integer weights in blocks of 128, channels scaled by activation (AWQ)",
            weight=(INT4_BLOCK,),
            input=None,
            layers="linear",
            algorithm="awq_lite",
            min_sm=80,
            evidence=_HAS_INT4,
        ),
        Format(
            name="w4a8_awq",
            summary="int4_awq weights, computed with in FP8; FP8 inputs per tensor",
            weight=(INT4_BLOCK, FP8),
            input=FP8,
            layers="linear",
            algorithm="awq_lite",
            min_sm=89,
            evidence=_HAS_FP8,
        ),
        Format(
            name="nvfp4",
            summary="4-bit floats (E2M1) in blocks of 16 with E4M3 scales, inputs quantized dynamically",
            weight=(NVFP4,),
            input=NVFP4,
            layers="linear",
            algorithm="max",
            min_sm=120,
            evidence=_HAS_FP4,
            mha=True,
        ),
        Format(
            name="nvfp4_svdquant",
            summary="nvfp4, with a low-rank branch in high precision that takes the outliers",
            weight=(NVFP4,),
            input=NVFP4,
            layers="linear",
            algorithm="svdquant",
            min_sm=120,
            evidence=_HAS_FP4,
            mha=True,
        ),
        Format(
            name="mxfp8",
            summary="8-bit floats (E4M3) in blocks of 32 with power-of-two scales, all dynamic",
            weight=(MXFP8,),
            input=MXFP8,
            layers="linear",
            algorithm=None,
            min_sm=89,
            evidence=_HAS_FP8,
        ),
    )
}
FORMATS |= plugins.load("diffc.formats", Format, FORMATS)

STORED = Format(
    name="stored",
    summary="as the model's file holds it: its own codes and scales, for the layers that it has quantized",
    weight=(),
    input=None,
    layers="all",
    algorithm=None,
    min_sm=75,
    evidence="that of what the file holds",
)
"""The format of a file that is quantized already; not in FORMATS, since nothing is quantized with it."""

MIXED = Format(
    name="mixed",
    summary="each layer in the format that a plan gives it (`diffc mix`)",
    weight=(NVFP4,),
    input=NVFP4,
    layers="all",
    algorithm="max",
    min_sm=75,
    evidence="that of the formats in the plan",
)
"""The format of a checkpoint with several formats; not in FORMATS, since `diffc mix` alone calibrates it. Its kinds are
the coarsest that it may have: they decide on tolerances."""


FORMAT_ALIASES: Mapping[str, str] = {
    "fp4": "nvfp4",
    "float8": "fp8",
    "e4m3": "fp8",
    "int4": "int4_awq",
    "awq": "int4_awq",
    "w4a16": "int4_awq",
    "w4a8": "w4a8_awq",
    "smoothquant": "int8_smoothquant",
    "int8_sq": "int8_smoothquant",
    "svdquant": "nvfp4_svdquant",
    "fp4_svdquant": "nvfp4_svdquant",
    "int8_default_cfg": "int8",
    "int8_smoothquant_cfg": "int8_smoothquant",
    "fp8_default_cfg": "fp8",
    "int4_awq_cfg": "int4_awq",
    "w4a8_awq_beta_cfg": "w4a8_awq",
    "nvfp4_default_cfg": "nvfp4",
    "nvfp4_svdquant_default_cfg": "nvfp4_svdquant",
    "mxfp8_default_cfg": "mxfp8",
}
"""Other names of formats: those of ModelOpt's scripts (--format fp4) and of its configs (mtq.NVFP4_DEFAULT_CFG)."""


def format_name(name: str) -> str:
    """The name of the format that `name` means: other names, "-" for "_" and capitals are understood."""
    if name in FORMATS:
        return name
    spelled = name.lower().replace("-", "_")
    return FORMAT_ALIASES.get(spelled, spelled if spelled in FORMATS else name)


def find_format(name: str) -> Format:
    """The format that `name` means (see `format_name`).

    Raises UsageError that lists the known ones, or that names the packages of a plugin which cannot be used.
    """
    key = format_name(name)
    if key in (STORED.name, MIXED.name):
        return STORED if key == STORED.name else MIXED
    if key in FORMATS:
        return FORMATS[key]
    unusable = plugins.unusable("diffc.formats", "format", key.replace("-", "_"))
    raise unusable or unknown_value("format", name, FORMATS, fix="choose one of these with --format")
