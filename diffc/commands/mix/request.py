"""What a mix is asked for, and what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffc.compile.calibration import PipelineRun
from diffc.errors import UsageError
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.quantize.options import DEFAULT_OPTIONS, QuantOptions

MIXABLE = ("nvfp4", "fp8", "int8")
"""The formats that layers may have, unless told otherwise."""


@dataclass(frozen=True)
class MixRequest:
    """What is asked for: one of four things.

    `bits` a weight on average, a `size` in bytes of all weights of the backbone, the smallest size whose pictures are
    within `psnr` dB of the unquantized model's, or a `plan` that is there.

    `formats` are those that layers may have, beside the model's own type. `options` are for those that take them. `run`
    is how the pipeline is run where that is known already, else it follows from `prompts` to `seed`, which are as in
    CompileRequest.
    """

    model: str
    output: Path
    bits: float | None = None
    size: int | None = None
    plan: Path | None = None
    formats: tuple[str, ...] = MIXABLE
    prompts: tuple[str, ...] | None = None
    steps: int | None = None
    batch_size: int = 4
    image_size: int | None = None
    seed: int = 0
    plot: Path | None = None
    hub: HubOptions = DEFAULT_HUB
    psnr: float | None = None
    options: QuantOptions = DEFAULT_OPTIONS
    run: PipelineRun | None = None
    calib_size: int | None = None

    def check(self) -> None:
        """Raises UsageError where not exactly one thing is asked for, or nothing can be of that size."""
        asked = (self.bits, self.size, self.psnr, self.plan)
        if sum(given is not None for given in asked) != 1:
            raise UsageError(
                "one of --bits, --size, --psnr and --plan is needed", fix="give, for example, --bits 5.5"
            )
        for name, value in (("bits", self.bits), ("size", self.size), ("psnr", self.psnr)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"--{name} is {value:g}", fix="give a number above 0")


@dataclass(frozen=True)
class Mix:
    """A way to quantize: its name, the bits of a weight on average, and the noise at the output (`noise_of`).

    `formats` are those of the layers, by path. `psnr` is that of pictures, where these were painted.
    """

    name: str
    bits: float
    noise: float
    formats: Mapping[str, str] = field(default_factory=dict, repr=False)
    psnr: float | None = None

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of the backbone's output in dB."""
        return -10 * math.log10(self.noise) if self.noise else math.inf
