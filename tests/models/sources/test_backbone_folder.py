"""The reader of backbone folders: config.json beside safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import FAMILIES
from diffc.models.sources.backbone_folder import READER
from tests.models.sources.folders import FILE, FLUX, KEYS, backbone, files_of


def test_backbone_folder(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "mine")
    source = READER.open(str(folder))
    assert (source.name, source.pipeline_dir, source.path) == ("mine", None, folder)
    assert (source.family, source.config) == (FAMILIES["flux"], FLUX)
    assert files_of(dict(source.weights)) == dict.fromkeys(KEYS, folder / FILE)


def test_it_declines_what_is_not_such_a_folder(tmp_path: Path) -> None:
    assert READER.declines(str(backbone(tmp_path / "mine"))) is None
    assert str(READER.declines(str(tmp_path))).endswith("has no config.json")
    assert str(READER.declines(str(tmp_path / "absent"))).endswith("is not a folder")


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert READER.open("./mine").path == tmp_path / "mine"


@pytest.mark.parametrize(
    "config", [{"_class_name": "QwenImageTransformer2DModel"}, {"_class_name": ["x"]}, {}]
)
def test_unknown_class_is_told_before_weights_are_looked_at(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"config\.json: no support for a backbone of class"):
        READER.open(str(backbone(tmp_path, config, weights=None)))


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="folder without weights"):
        READER.open(str(backbone(tmp_path, weights=None)))
