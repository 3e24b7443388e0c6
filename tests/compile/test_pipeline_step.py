"""One step of a pipeline with a recorder in the backbone's place, held against the graph's interface."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffc.compile.pipeline_step import check_call, check_step, checked_first_call
from diffc.errors import UnsupportedError
from diffc.models.embedded import tiny
from diffc.models.embedded.catalogue import materialize
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import FAMILIES
from diffc.models.sources.live import live_source
from diffc.models.sources.locate import locate
from diffc.models.spec import Shape
from tests.backbones import backbone_of, inputs_of

CONFIGS: dict[str, dict[str, Any]] = {"sd3": tiny.SD35, "flux": tiny.FLUX, "sdxl": tiny.SDXL}


def call(name: str) -> dict[str, Any]:
    family, config = FAMILIES[name], CONFIGS[name]
    values = random_inputs(family, config, Shape(2, 128, 192, 11), dtype=torch.float32, seed=3)
    return forward_kwargs(family, config, values) | {
        "return_dict": False,
        "joint_attention_kwargs": {},
        "mask": None,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inputs_of_a_family_fit(name: str) -> None:
    check_call(FAMILIES[name], CONFIGS[name], call(name), "Pipe")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mid_block_additional_residual": torch.ones(1)}, "gives mid_block_additional_residual, which the graph does"),
        ({"encoder_hidden_states": None}, "does not give encoder_hidden_states"),
        ({"sample": torch.ones(2, 9, 16, 24)}, r"gives sample of shape \[2, 9, 16, 24\], and the graph takes"),
        ({"encoder_hidden_states": torch.ones(3, 11, 128)}, r"encoder_hidden_states of shape \[3, 11, 128\]"),
        ({"timestep": torch.ones(2)}, r"timestep of shape \[2\], and the graph takes \[\]"),
        ({"added_cond_kwargs": {"text_embeds": torch.ones(2, 64)}}, "does not give added_cond_kwargs.time_ids"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        check_call(FAMILIES["sdxl"], tiny.SDXL, call("sdxl") | change, "Pipe")


def pipeline(folder: Path, **changed: Any) -> str:
    """tiny-sdxl with another UNet."""
    shutil.copytree(materialize("tiny-sdxl"), folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config({**config, **changed}).save_pretrained(folder / "unet")
    return str(folder)


def test_pipelines_are_run_without_their_backbone(tmp_path: Path) -> None:
    assert check_step(locate(pipeline(tmp_path / "lcm", time_cond_proj_dim=16))) == ""
    other = locate(pipeline(tmp_path / "other", cross_attention_dim=96))
    with pytest.raises(UnsupportedError, match=r"StableDiffusionXLPipeline .* of shape \[2, 77, 128\], and"):
        check_step(other)
    painting = pipeline(tmp_path / "inpaint", in_channels=9)
    index = json.loads((tmp_path / "inpaint" / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionXLInpaintPipeline"
    (tmp_path / "inpaint" / "model_index.json").write_text(json.dumps(index))
    assert check_step(locate(painting)) == ""
    shutil.rmtree(tmp_path / "lcm" / "tokenizer")
    assert "does not run here" in check_step(locate(str(tmp_path / "lcm")))


def test_the_first_call_of_a_calibration_is_checked_and_no_other() -> None:
    backbone = backbone_of("sd3")
    source = live_source(backbone)
    given = inputs_of("sd3")
    wrong = given | {"timestep": given["timestep"][:1].expand(1, 1)}
    with torch.no_grad(), checked_first_call(backbone, source):
        backbone(**given)
        with pytest.raises(AssertionError, match="1d-array"):  # torch's own: this is the second call
            backbone(**wrong)
    with pytest.raises(UnsupportedError, match="timestep of shape"), checked_first_call(backbone, source):
        backbone(**wrong)
