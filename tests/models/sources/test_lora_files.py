"""diffc/models/sources/lora_files.py: the text of --lora, and files of the hub's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.errors import DiffcError, UsageError
from diffc.models.sources.lora_files import LoraSpec, lora_path, parse_lora
from diffc.models.sources.source import HubOptions


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.safetensors", LoraSpec("a.safetensors")),
        ("a.safetensors=0.8", LoraSpec("a.safetensors", 0.8)),
        ("a.safetensors=-1e-1,mid*=0", LoraSpec("a.safetensors", -0.1, (("mid*", 0.0),))),
        ("o/n=*attn*=0.5", LoraSpec("o/n", 1.0, (("*attn*", 0.5),))),
        (r"C:\loras\a.safetensors=2", LoraSpec(r"C:\loras\a.safetensors", 2.0)),
    ],
)
def test_parse(text: str, spec: LoraSpec) -> None:
    assert parse_lora(text) == spec
    assert LoraSpec.from_json({"file": spec.file, "weight": spec.weight, "patterns": spec.patterns}) == spec


def test_a_path_that_exists_may_have_an_equals_sign(tmp_path: Path) -> None:
    file = tmp_path / "a=b.safetensors"
    file.touch()
    assert parse_lora(f"{file}=0.5") == LoraSpec(str(file), 0.5)
    assert parse_lora(str(file)) == LoraSpec(str(file))


@pytest.mark.parametrize("text", ["", "=1", "a=b", "a=1,b", "a=nan", "a=1,=2", "a=1,x=y"])
def test_refused_texts_say_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="FILE=WEIGHT"):
        parse_lora(text)


def test_files_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = HubOptions(cache_dir=tmp_path)
    folder = tmp_path / "models--o--n" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    with pytest.raises(DiffcError, match="several LoRA files, or none"):
        lora_path(LoraSpec("o/n"), hub)
    (folder / "x.safetensors").touch()
    assert lora_path(LoraSpec("o/n"), hub) == folder / "x.safetensors"
    (folder / "y.safetensors").touch()
    assert lora_path(LoraSpec("o/n/y.safetensors"), hub) == folder / "y.safetensors"
    with pytest.raises(DiffcError, match=r"x\.safetensors, y\.safetensors"):
        lora_path(LoraSpec("o/n"), hub)
    with pytest.raises(DiffcError, match="not in the hub's cache"):
        lora_path(LoraSpec("o/other"), hub)


def test_a_missing_file_says_how_a_lora_of_the_hub_is_named(tmp_path: Path) -> None:
    with pytest.raises(DiffcError, match="OWNER/NAME"):
        lora_path(LoraSpec(str(tmp_path / "a.safetensors")))
