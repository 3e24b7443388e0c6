"""Opening the pipeline of a source."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.locate import locate
from diffc.models.sources.pipelines import open_pipeline
from tools.prove.family_models import make


def test_a_pipeline_opens_without_what_is_left_out() -> None:
    source = locate("tiny-sdxl")
    pipe = open_pipeline(source, dtype=torch.float16, fix="x", unet=None)
    assert pipe.unet is None
    assert pipe.text_encoder.dtype == torch.float16


def test_a_backbone_alone_has_none() -> None:
    source = locate(str(locate("tiny-sd3").path))
    with pytest.raises(DiffcError, match="is a backbone alone"):
        open_pipeline(source, dtype=torch.float32, fix="x")


def test_what_diffusers_cannot_load_comes_with_the_fix(tmp_path: Path) -> None:
    pipeline = Path(shutil.copytree(materialize("tiny-sd3"), tmp_path / "sd3"))
    (pipeline / "scheduler" / "scheduler_config.json").write_text("{")
    source = locate(str(pipeline))
    with pytest.raises(DiffcError, match=r"diffusers cannot load the pipeline in .*\n  Fix: download it"):
        open_pipeline(source, dtype=torch.float32, fix="download it")


def test_a_part_that_is_given_is_used_though_the_pipeline_can_do_without(tmp_path: Path) -> None:
    """WAN's transformers have a default of None; DiffusionPipeline loads them from files whatever it is given."""
    source = locate(str(make("wan5b", tmp_path)))
    given = load_backbone(source, torch.float32)
    pipe = open_pipeline(source, dtype=torch.float32, fix="x", transformer=given)
    assert pipe.transformer is given
    assert pipe.transformer_2 is None
