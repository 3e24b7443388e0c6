"""The configurations of released models; `random_model` makes full-size backbones of them.

`configs/NAME.json` is the backbone's config.json of a family that has a file. Of the others the inputs are read off the
pipeline, so `configs/pipelines/NAME.json` has all of it: model_index.json, and the configuration of each component.
"""

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


@dataclass(frozen=True)
class RealPipeline:
    """A released pipeline: `backbones` are its components that get weights; `parameters` counts one of them."""

    name: str
    dtype: str
    parameters: int
    description: str
    backbones: tuple[str, ...] = ("transformer",)

    @property
    def parts(self) -> Mapping[str, Mapping[str, Any]]:
        """ "model_index", and every component, to the content of its configuration."""
        file = resources.files("diffc.models.embedded") / "configs" / "pipelines" / f"{self.name}.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    @property
    def backbone(self) -> str:
        """The class of the backbone."""
        return str(self.parts["model_index"][self.backbones[0]][1])


PIPELINES: dict[str, RealPipeline] = {
    model.name: model
    for model in (
        RealPipeline("sd15", "float16", 859_520_964, "Stable Diffusion 1.5", ("unet",)),
        RealPipeline("sd21", "float16", 865_910_724, "Stable Diffusion 2.1", ("unet",)),
        RealPipeline("pixart-sigma", "float16", 610_856_096, "PixArt-Sigma XL"),
        RealPipeline("sana", "bfloat16", 1_604_462_752, "Sana 1.6B"),
        RealPipeline("auraflow", "float16", 6_858_605_568, "AuraFlow 0.3"),
        RealPipeline("lumina2", "bfloat16", 2_609_769_152, "Lumina Image 2.0"),
        RealPipeline("z-image", "bfloat16", 6_154_908_736, "Z-Image Turbo"),
        RealPipeline("chroma", "bfloat16", 8_899_983_424, "Chroma1"),
        RealPipeline("qwen-image", "bfloat16", 20_430_401_088, "Qwen-Image"),
        RealPipeline("flux2-dev", "bfloat16", 32_223_281_152, "FLUX.2-dev"),
        RealPipeline("ltx-video", "bfloat16", 1_923_385_472, "LTX-Video 0.9"),
        RealPipeline("cogvideox-5b", "bfloat16", 5_570_283_072, "CogVideoX-5b"),
        RealPipeline("hunyuanvideo", "bfloat16", 12_821_012_544, "HunyuanVideo"),
        RealPipeline("wan2.2-t2v-5b", "bfloat16", 4_999_787_712, "WAN 2.2 TI2V 5B"),
        RealPipeline(
            *("wan2.2-t2v-14b", "bfloat16", 14_288_491_584, "WAN 2.2 T2V A14B, each of two experts"),
            backbones=("transformer", "transformer_2"),
        ),
    )
}
RELEASES: dict[str, RealModel | RealPipeline] = {**REAL, **PIPELINES}
"""All that can be made in full size, by name."""
