"""The kinds of quantizers, one row each: ModelOpt's attributes, the arithmetic in torch, and the nodes in ONNX.

A format says which kinds a weight and an input go through; everything that differs between kinds is in the rows here.
Nothing here imports torch or onnxscript before a row's function is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from diffc.errors import DiffcError
from diffc.quantize import nodes
from diffc.quantize.simulate import (
    E2M1_MAX,
    E4M3_MAX,
    FOUR_SIX_MAX,
    four_six_round_trip,
    mxfp8_fake_quant,
    nvfp4_round_trip,
)
from passes.graph.trt_ops import FOUR_OVER_SIX
from passes.weights.recipe import Recipe
from passes.weights.sources import keep

if TYPE_CHECKING:
    import torch

Settings = Mapping[str, Any]
"""Attributes of a quantizer as JSON values: num_bits, axis, block_sizes, type, unsigned, narrow_range."""


@dataclass(frozen=True)
class Kind:
    """What a quantizer does to values.

    `attributes` are those of ModelOpt's TensorQuantizer that tell this kind from others; its block size there is the
    one that formats take unless they are asked for another. `lowest` and `bound` are the smallest and largest value
    that the stored type represents; amax / bound is the scale. `scale_bits` are those of a stored block scale.

    `round_trip` is the arithmetic in torch: (x, scale) -> what remains of x, in the type of x. A scale of blocks that
    are not dynamic has been spread to the shape of x. `onnx_nodes` gives the same as ONNX nodes, for x and scale as
    values of onnxscript, the axis of a scale per channel (or None), and the block size (0 without blocks).
    `codes_of`: the kind that has the same codes and scales, found in another way; empty for its own.
    `portable`: the scale is stored in the compute type, so amax is rounded such that all compute types hold it exactly.
    """

    name: str
    attributes: Mapping[str, Any]
    bound: float
    lowest: float
    round_trip: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    onnx_nodes: Callable[[Any, Any, int | None, int], Any]
    scale_bits: int | None = None
    has_amax: bool = True
    portable: bool = True
    codes_of: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def blocks(self) -> str | None:
        """How the scales of blocks are found: "static" (calibrated), "dynamic" (at run time), None without blocks."""
        blocks = self.attributes.get("block_sizes")
        return None if blocks is None else str(blocks["type"])

    @property
    def dynamic(self) -> bool:
        """Whether block scales are found at run time."""
        return self.blocks == "dynamic"

    @property
    def codes(self) -> str:
        """The name of the kind as whoever computes with the codes knows it."""
        return self.codes_of or self.name

    @property
    def bits(self) -> int:
        """Bits of a stored value, without its scale."""
        bits = self.attributes["num_bits"]
        return int(bits) if isinstance(bits, int) else 1 + sum(bits)

    def scale_recipe(self, amax: npt.NDArray[np.float32]) -> Recipe:
        """The recipe of the scale amax / bound, float32 and of the shape of `amax`; many values are not inlined."""
        if not self.portable:  # torch divides by a number like this on CUDA, where ModelOpt's kernel runs
            return Recipe.of_array(amax * np.float32(1 / self.bound))
        recipe = Recipe.of_array(amax) if amax.size == 1 else keep(amax)
        return recipe.scale_of_amax(self.bound)


def _round_to_integers(lowest: float, bound: float) -> Callable[..., torch.Tensor]:
    def round_trip(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ((x.float() / scale).round().clamp(lowest, bound) * scale).to(x.dtype)

    return round_trip


def _round_to_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    import torch

    steps = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "int8",
            {"num_bits": 8},
            bound=127.0,
            lowest=-128.0,
            round_trip=_round_to_integers(-128.0, 127.0),
            onnx_nodes=nodes.quantize_linear(TensorProto.INT8),
        ),
        Kind(
            "int4",
            {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
            bound=7.0,
            lowest=-8.0,
            round_trip=_round_to_integers(-8.0, 7.0),
            onnx_nodes=nodes.quantize_linear(TensorProto.INT4),
            scale_bits=16,
        ),
        Kind(
            "fp8",
            {"num_bits": (4, 3)},
            bound=E4M3_MAX,
            lowest=-E4M3_MAX,
            round_trip=_round_to_e4m3,
            onnx_nodes=nodes.quantize_linear(TensorProto.FLOAT8E4M3FN),
        ),
        Kind(
            "nvfp4",
            {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
            bound=E2M1_MAX * E4M3_MAX,  # of a value times that of its block's scale
            lowest=-E2M1_MAX * E4M3_MAX,
            round_trip=nvfp4_round_trip,
            onnx_nodes=nodes.nvfp4,
            scale_bits=8,
            portable=False,
        ),
        Kind(
            "nvfp4_four_six",  # of weights alone: no GPU finds such scales at run time
            {
                "num_bits": (2, 1),
                "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3), FOUR_OVER_SIX: True},
            },
            bound=E2M1_MAX * FOUR_SIX_MAX,
            lowest=-E2M1_MAX * FOUR_SIX_MAX,
            round_trip=four_six_round_trip,
            onnx_nodes=nodes.four_six,
            scale_bits=8,
            portable=False,
            codes_of="nvfp4",
        ),
        Kind(
            "mxfp8",
            {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
            bound=E4M3_MAX,
            lowest=-E4M3_MAX,
            round_trip=lambda x, _: mxfp8_fake_quant(x),
            onnx_nodes=nodes.mxfp8,
            scale_bits=8,
            has_amax=False,
        ),
    )
}


def kind_of(settings: Settings) -> Kind:
    """The kind of a quantizer with these settings, or with a format's attributes. Raises DiffcError for any other."""
    told = _told_by(settings)
    for kind in KINDS.values():
        if _told_by(kind.attributes) == told:
            return kind
    raise DiffcError(
        f"a quantizer of {settings['num_bits']} bits with blocks {settings.get('block_sizes')} is not of a kind that"
        " diffc compiles",
        fix="quantize with one of the formats of `diffc formats`",
    )


def _told_by(settings: Settings) -> Any:
    """What tells kinds apart: the bits of a value, and how its block scales are found, stored and chosen."""
    bits, blocks = settings["num_bits"], settings.get("block_sizes") or {}
    how = blocks.get("type", "static") if blocks else None
    scale = tuple(blocks["scale_bits"]) if how == "dynamic" else None
    return bits if isinstance(bits, int) else tuple(bits), how, scale, bool(blocks.get(FOUR_OVER_SIX))


def block_size_of(settings: Settings) -> int | None:
    """Elements that share a scale, along the last axis; None for per-tensor and per-channel quantizers."""
    blocks = settings.get("block_sizes")
    if not blocks:
        return None
    return int(blocks["-1"] if "-1" in blocks else blocks[-1])
