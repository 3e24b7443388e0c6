"""Opening the pipeline of a source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffc.errors import DiffcError
from diffc.models.sources.locate import locate
from diffc.models.sources.pipelines import open_pipeline


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
    source = replace(locate("tiny-sd3"), pipeline_dir=tmp_path)
    with pytest.raises(DiffcError, match=r"diffusers cannot load the pipeline in .*\n  Fix: download it"):
        open_pipeline(source, dtype=torch.float32, fix="download it")
