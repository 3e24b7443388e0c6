"""The reader of embedded models by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.sources import pipeline_folder
from diffc.models.sources.embedded_name import READER


def test_a_name_is_the_folder_that_is_made_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFC_CACHE", str(tmp_path))
    source = READER.open("tiny-sd35")
    assert (source.name, source.family.name) == ("tiny-sd35", "sd3")
    assert source.pipeline_dir is not None
    assert source.path == source.pipeline_dir / "transformer"
    assert "transformer_blocks.0.attn2.norm_q.weight" in source.weights
    copy = pipeline_folder.READER.open(str(shutil.copytree(source.pipeline_dir, tmp_path / "copy")))
    assert copy.weights.keys() == source.weights.keys()
    assert (copy.name, copy.fingerprint) == ("copy", source.fingerprint)


def test_only_names_are_taken() -> None:
    assert all(READER.declines(name) is None for name in EMBEDDED)
    assert READER.declines("./tiny-sd3") == "'./tiny-sd3' is not the name of an embedded model"
    assert all(name in READER.expects for name in EMBEDDED)
