"""How a pipeline is meant to be sampled: denoising steps and guidance, as far as its own files or its name tell.

Turbo and schnell models are distilled to few steps without guidance. Calibrated with the settings of their teachers,
their quantizers would see other activations than they do in use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import read_scheduler
from diffc.models.sources.source import ModelSource

STEPS = 20
"""Denoising steps where nothing tells how many are usual."""


@dataclass(frozen=True)
class Sampling:
    """Denoising `steps` and `guidance` of a pipeline's call, and what tells them; guidance None is the family's."""

    steps: int
    guidance: float | None
    why: str = ""

    def __str__(self) -> str:
        guidance = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"calibration runs {self.steps} steps{guidance}{self.why and f', {self.why}'}"


# From the model cards of stabilityai/sdxl-turbo, stabilityai/stable-diffusion-3.5-large-turbo,
# ByteDance/SDXL-Lightning, black-forest-labs/FLUX.1-schnell and latent-consistency/lcm-sdxl on https://huggingface.co.
_BY_NAME: Mapping[str, tuple[int, float]] = {
    r"(sdxl?|large|medium)-turbo\b": (4, 0.0),
    r"flux\.1-schnell\b": (4, 0.0),
    r"sdxl-lightning\b": (4, 0.0),
    r"\blcm-": (4, 8.0),
}


def sampling_of(source: ModelSource) -> Sampling:
    """The usual steps and guidance of a model: read off its pipeline's scheduler, or known by the model's name."""
    if found := _by_scheduler(source, _scheduler(source)):
        return found
    loaded_from = (source.origin or {}).get("loaded_from", "")
    place = f"{source.name} {source.pipeline_dir.name if source.pipeline_dir else loaded_from}"
    for pattern, (steps, guidance) in _BY_NAME.items():
        if match := re.search(pattern, place, re.IGNORECASE):
            return Sampling(steps, guidance, f"as {match[0]} models are sampled")
    return Sampling(STEPS, None)


def _scheduler(source: ModelSource) -> Mapping[str, Any]:
    """The config of the pipeline's scheduler with the name of its class; empty where there is none."""
    if source.pipeline is not None and hasattr(source.pipeline, "scheduler"):
        scheduler = source.pipeline.scheduler
        return {**scheduler.config, "_class_name": type(scheduler).__name__}
    pipeline = source.pipeline_dir
    if pipeline is None or not (pipeline / "scheduler" / "scheduler_config.json").is_file():
        return {}
    return read_scheduler(inside(pipeline, "scheduler") / "scheduler_config.json")


def _by_scheduler(source: ModelSource, config: Mapping[str, Any]) -> Sampling | None:
    """What the config of a scheduler tells; None for one that suits models with many steps."""
    kind = config.get("_class_name")
    if kind == "LCMScheduler":
        # LCM models take guidance as an input; models with an LCM-LoRA merged take none.
        return Sampling(4, 8.0 if source.config.get("time_cond_proj_dim") else 1.0, f"as its {kind} tells")
    if kind == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing":
        return Sampling(4, 0.0, f"as its {kind} with trailing timesteps tells (SDXL-Turbo has it)")
    return None
