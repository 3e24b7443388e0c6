"""JSON files of a model folder: read, or one error that names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.errors import DiffcError
from diffc.models.sources.json_files import read_json, read_scheduler


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, {"b": "\u00e4"}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": "\u00e4"}]}


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"{", "not valid JSON"), (b"[1]", "not a JSON object"), (b"\xff\xfe{", "not text in UTF-8")],
)
def test_corrupt_text(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(DiffcError, match=f"config.json .*{said}"):
        read_json(tmp_path / "config.json")


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="is a folder, not a file"):
        read_json(tmp_path)


def test_the_infinity_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    DPMSolverMultistepScheduler().save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    assert "-Infinity" in file.read_text(encoding="utf-8")
    found = read_scheduler(file)
    assert (found["_class_name"], found["lambda_min_clipped"]) == ("DPMSolverMultistepScheduler", None)
    file.write_text('{"name": "to Infinity, and beyond", "a": [1, Infinity]}', encoding="utf-8")
    with pytest.raises(DiffcError, match="Infinity"):
        read_scheduler(file)
