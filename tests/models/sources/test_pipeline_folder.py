"""The reader of diffusers pipeline folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.embedded import tiny
from diffc.models.sources.pipeline_folder import READER
from tests.models.sources.folders import backbone, config_of


def test_pipeline_with_a_unet(tmp_path: Path) -> None:
    backbone(tmp_path / "unet", config_of("UNet2DConditionModel", tiny.SDXL))
    index = {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": [None, None]}))
    source = READER.open(str(tmp_path))
    assert (source.family.name, source.pipeline_dir, source.path) == ("sdxl", tmp_path, tmp_path / "unet")
    assert source.name == tmp_path.name


def test_it_declines_what_is_not_such_a_folder(tmp_path: Path) -> None:
    assert str(READER.declines(str(tmp_path))).endswith("has no model_index.json")
    assert str(READER.declines(str(tmp_path / "absent"))).endswith("is not a folder")
    (tmp_path / "model_index.json").write_text("{}")
    assert READER.declines(str(tmp_path)) is None


def test_pipeline_without_a_backbone(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "WuerstchenPipeline", "prior": ["a", "b"]})
    )
    with pytest.raises(
        UnsupportedError, match="WuerstchenPipeline has none of the components transformer, unet"
    ):
        READER.open(str(tmp_path))


def test_pipeline_without_the_folder_of_its_backbone(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    with pytest.raises(DiffcError, match="names the component 'transformer'"):
        READER.open(str(tmp_path))


def test_config_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    (tmp_path / "transformer" / "config.json").mkdir(parents=True)
    with pytest.raises(DiffcError, match=r"config\.json"):
        READER.open(str(tmp_path))


def test_a_backbone_under_another_name_is_known_by_its_class(tmp_path: Path) -> None:
    index = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "controlnet": ["diffusers", "UNetControlNetXSModel"],
        "prior": ["diffusers", "StableCascadeUNet"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DiffcError, match="names the component 'prior'"):
        READER.open(str(tmp_path))
