"""The options of quantization: those of ModelOpt's diffusion scripts, checked against the format up front."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffc.errors import UnsupportedError, UsageError, unknown_value
from diffc.quantize.formats import FORMATS, FP8, NVFP4_FOUR_SIX, Format, Quantizer

LEVELS = (1.0, 2.0, 2.5, 3.0, 4.0)
COLLECT_METHODS = ("default", "global_min", "min-max", "min-mean", "mean-max")
MHA_LEVEL = 4.0
FOUR_SIX = "four-six"
WEIGHT_SCALES = ("max", FOUR_SIX)
AWQ = ("lite", "full")


@dataclass(frozen=True)
class QuantOptions:
    """How a format is applied; the defaults are those of ModelOpt's scripts.

    `mha`: attention's q, k and v in FP8 too. `level`: which layers (`chosen`); 4 means `mha`. `alpha` is
    SmoothQuant's, 0 (nothing moves into the weights) to 1. `percentile` (0 to 1) and `collect_method` are for the
    inputs of INT8 convolutions. `lowrank` is SVDQuant's rank. `block_size` overrides the format's. `keep` are
    fnmatch patterns of module paths that stay unquantized beside those of the family. `weight_scales` "four-six" lets
    the largest magnitude of each block of an NVFP4 weight become 6 or 4, whichever loses less. `awq` "full" also
    clips the blocks of INT4 weights where that lowers the error of a layer's output, after a third run of the prompts.
    """

    mha: bool = False
    level: float = 3.0
    alpha: float = 1.0
    percentile: float = 1.0
    collect_method: str = "default"
    lowrank: int = 32
    block_size: int | None = None
    keep: tuple[str, ...] = ()
    weight_scales: str = "max"
    awq: str = "lite"

    def check(self, fmt: Format) -> None:
        """Raises DiffcError for values out of range, and for options that the format has no use for."""
        if self.level not in LEVELS:
            raise unknown_value("quant level", f"{self.level:g}", [f"{level:g}" for level in LEVELS])
        if self.collect_method not in COLLECT_METHODS:
            raise unknown_value("collect method", self.collect_method, COLLECT_METHODS)
        if self.weight_scales not in WEIGHT_SCALES:
            raise unknown_value("choice of weight scales", self.weight_scales, WEIGHT_SCALES)
        for name, value, low, high in (
            ("alpha", self.alpha, 0, 1),
            ("percentile", self.percentile, 0, 1),
            ("lowrank", self.lowrank, 1, 1 << 12),
        ):
            if not low <= value <= high:
                raise UsageError(f"--{name} is {value:g}", fix=f"give {low} to {high}")
        if self.awq not in AWQ:
            raise unknown_value("AWQ", self.awq, AWQ)
        self._check_use(fmt)

    def _check_use(self, fmt: Format) -> None:
        given = vars(self)
        for field, option, users in _USERS:
            unchanged = given[field] in (getattr(DEFAULT_OPTIONS, field), getattr(fmt, field, None))
            if not unchanged and fmt.name not in users:
                raise UnsupportedError(
                    f"{option} has no meaning for format {fmt.name!r}; it is for {', '.join(users)}",
                    fix=f"leave {option} out, or choose another --format",
                )
        if self.collect_method != "default" and self.percentile == 0:
            raise UsageError("--percentile 0 takes no step at all", fix="give a share of steps above 0")
        if self.quantizes_attention and not fmt.mha:
            able = ", ".join(f.name for f in FORMATS.values() if f.mha)
            raise UnsupportedError(
                f"attention runs in FP8 beside {able}; not beside {fmt.name!r}",
                fix="leave out --quantize-mha and --quant-level 4, or choose one of these formats",
            )
        if fmt.name in _BLOCKED and self.block_size not in (None, *_BLOCKS):
            raise UnsupportedError(
                f"the compiler has no kernels for {fmt.name} in blocks of {self.block_size}",
                fix=f"give one of {', '.join(map(str, _BLOCKS))}",
            )

    @property
    def quantizes_attention(self) -> bool:
        """Whether q, k and v are quantized."""
        return self.mha or self.level >= MHA_LEVEL

    def chosen(self, path: str, convolution: bool) -> bool:
        """Whether the level quantizes the layer at `path`.

        As ModelOpt's `quantize_lvl`: convolutions always, feed-forward from 2, q, k and v from 2.5, all
        linear layers from 3.
        """
        if convolution or self.level >= 3:
            return True
        feed_forward = re.search(r"\bff(_context)?\.net\b|\.proj_mlp$", path) is not None
        projects = re.search(r"\bto_[qkv]$|\badd_[qkv]_proj$", path) is not None
        return (self.level >= 2 and feed_forward) or (self.level >= 2.5 and projects)

    def keeps(self, path: str) -> bool:
        """Whether one of the user's own patterns leaves the layer at `path` as it is."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.keep)

    def quantizers(self, fmt: Format) -> tuple[tuple[Quantizer, ...], Quantizer | None]:
        """What weight and input go through, with the block size and the scales asked for."""
        if self.weight_scales == FOUR_SIX:
            return (NVFP4_FOUR_SIX,), fmt.input
        if self.block_size is None:
            return fmt.weight, fmt.input
        first, *rest = (_sized(quantizer, self.block_size) for quantizer in fmt.weight)
        return (first, *rest), None if fmt.input is None else _sized(fmt.input, self.block_size)

    def rules(self, fmt: Format) -> list[dict[str, Any]]:
        """ModelOpt's `quant_cfg`: an ordered list of rules, for a backbone whose chosen layers are converted."""
        weight, activation = self.quantizers(fmt)
        rules: list[dict[str, Any]] = [
            {"quantizer_name": "*", "enable": False},
            _rule("*weight_quantizer", *weight),
        ]
        rules += [] if activation is None else [_rule("*input_quantizer", activation)]
        if self.quantizes_attention:
            rules.append(_rule("*[qkv]_bmm_quantizer", FP8))
        return rules


DEFAULT_OPTIONS = QuantOptions()
"""What ModelOpt's scripts do when nothing is asked for."""
_BLOCKED = ("int4_awq", "w4a8_awq")
_BLOCKS = (32, 64, 128)  # sizes of INT4 blocks that the TensorRT-RTX builder takes
_USERS: Sequence[tuple[str, str, tuple[str, ...]]] = (
    ("alpha", "--alpha", ("int8_smoothquant",)),
    ("percentile", "--percentile", ("int8", "int8_smoothquant")),
    ("collect_method", "--collect-method", ("int8", "int8_smoothquant")),
    ("lowrank", "--lowrank", ("nvfp4_svdquant",)),
    ("block_size", "--block-size", _BLOCKED),
    ("weight_scales", "--weight-scales", ("nvfp4", "nvfp4_svdquant")),
    ("awq", "--awq", _BLOCKED),
)


def _rule(name: str, *quantizers: Quantizer) -> dict[str, Any]:
    cfg: Any = [dict(quantizer) for quantizer in quantizers]
    return {"quantizer_name": name, "cfg": cfg if len(cfg) > 1 else cfg[0]}


def _sized(quantizer: Quantizer, size: int) -> Quantizer:
    blocks = quantizer.get("block_sizes")
    return quantizer if blocks is None else {**quantizer, "block_sizes": {**blocks, -1: size}}
