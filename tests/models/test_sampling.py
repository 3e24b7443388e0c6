"""Steps and guidance of models that are distilled to few steps, read off their scheduler or name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from diffc.models.registry import find_family
from diffc.models.sampling import sampling_of
from diffc.models.sources.source import ModelSource

TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
PLAIN = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
LCM = {"_class_name": "LCMScheduler"}


def source(folder: Path, scheduler: dict[str, Any], name: str = "x", **config: Any) -> ModelSource:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return ModelSource(name, folder / "unet", folder, config, find_family("sdxl"), {})


@pytest.mark.parametrize(
    ("scheduler", "name", "config", "found"),
    [
        (PLAIN, "stabilityai/stable-diffusion-xl-base-1.0", {}, (20, None)),
        (TURBO, "my-own-folder", {}, (4, 0.0)),
        (PLAIN, "stabilityai/sdxl-turbo", {}, (4, 0.0)),
        (PLAIN, "stabilityai/stable-diffusion-3.5-large-turbo", {}, (4, 0.0)),
        (PLAIN, "black-forest-labs/FLUX.1-schnell", {}, (4, 0.0)),
        (PLAIN, "black-forest-labs/FLUX.1-dev", {}, (20, None)),
        (LCM, "x", {"time_cond_proj_dim": 256}, (4, 8.0)),
        (LCM, "sdxl with an LCM-LoRA", {}, (4, 1.0)),
    ],
)
def test_the_pipeline_tells(
    tmp_path: Path, scheduler: dict[str, Any], name: str, config: dict[str, Any], found: Any
) -> None:
    sampling = sampling_of(source(tmp_path, scheduler, name, **config))
    assert (sampling.steps, sampling.guidance) == found
    assert bool(sampling.why) == (found != (20, None))


def test_a_pipeline_in_memory_tells_as_well(tmp_path: Path) -> None:
    class EulerAncestralDiscreteScheduler:
        config: ClassVar = {"timestep_spacing": "trailing"}

    on_disk = source(tmp_path, PLAIN)
    live = replace(
        on_disk, pipeline_dir=None, pipeline=SimpleNamespace(scheduler=EulerAncestralDiscreteScheduler())
    )
    assert str(sampling_of(live)).startswith("calibration runs 4 steps, guidance 0, as its Euler")
    named = replace(on_disk, pipeline_dir=None, origin={"loaded_from": "stabilityai/sdxl-turbo"})
    assert sampling_of(named).steps == 4
