"""The configurations of released models (`configs/NAME.json`); `random_model` makes full-size backbones of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class RealModel:
    """A released backbone: `dtype` is that of its weights, `parameters` how many it has (buffers not counted)."""

    name: str
    family: str
    dtype: str
    parameters: int
    description: str

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json of the release."""
        file = resources.files("diffc.models.embedded") / "configs" / f"{self.name}.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content


REAL: dict[str, RealModel] = {
    model.name: model
    for model in (
        RealModel("sdxl", "sdxl", "float16", 2_567_463_684, "Stable Diffusion XL base 1.0"),
        RealModel("sd3-medium", "sd3", "float16", 2_028_328_000, "Stable Diffusion 3 medium"),
        RealModel("sd35-medium", "sd3", "bfloat16", 2_243_171_520, "Stable Diffusion 3.5 medium"),
        RealModel("flux-dev", "flux", "bfloat16", 11_901_408_320, "FLUX.1-dev"),
        RealModel("flux-schnell", "flux", "bfloat16", 11_891_178_560, "FLUX.1-schnell"),
    )
}
