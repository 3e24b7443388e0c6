"""Opening the pipeline of a source."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def edit(file: Path, **changed: Any) -> None:
    """Other entries in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changed), encoding="utf-8")


def keep(folder: Path, name: str) -> None:
    """All files of a folder but one go."""
    for file in folder.iterdir():
        if file.name != name:
            file.unlink()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


ENCODER = "text_encoder/config.json"
HARM: dict[str, Callable[[Path], object]] = {
    "a component of numbers": lambda p: edit(p / "model_index.json", text_encoder=[1, 2]),
    "a class that is not there": lambda p: edit(p / "model_index.json", vae=["diffusers", "NoSuchClass"]),
    "an encoder that is cut off": lambda p: cut(p / "text_encoder" / "model.safetensors"),
    "an entry of another type": lambda p: edit(p / ENCODER, hidden_size="x"),
    "an entry that fits no weights": lambda p: edit(p / ENCODER, intermediate_size=7),
    "no tokenizer": lambda p: shutil.rmtree(p / "tokenizer"),
    "an empty tokenizer": lambda p: [file.unlink() for file in (p / "tokenizer").iterdir()],
    "a tokenizer without words": lambda p: keep(p / "tokenizer", "tokenizer_config.json"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_part_that_is_damaged_is_one_message(harm: str, tmp_path: Path) -> None:
    pipeline = Path(shutil.copytree(materialize("tiny-sd3"), tmp_path / "sd3"))
    HARM[harm](pipeline)
    with pytest.raises(DiffcError, match=r"[\s\S]*\n  Fix: "):
        open_pipeline(locate(str(pipeline)), dtype=torch.float32, fix="download it", transformer=None)


CODE = "import pathlib\npathlib.Path({mark!r}).touch()\n"
FOREIGN: dict[str, Callable[[Path], object]] = {
    "a component's module": lambda p: edit(p / "model_index.json", vae=["foreign", "AutoencoderKL"]),
    "a pipeline's module": lambda p: edit(p / "model_index.json", _class_name=["foreign", "Pipeline"]),
    "a dotted name": lambda p: edit(p / "model_index.json", _class_name="foreign.Pipeline"),
    "auto_map": lambda p: edit(p / ENCODER, auto_map={"AutoModel": "foreign.Model"}),
    "custom_pipeline": lambda p: edit(p / "model_index.json", custom_pipeline="foreign"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_code_that_a_folder_names_does_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, mark = Path(shutil.copytree(materialize("tiny-sd3"), tmp_path / "sd3")), tmp_path / "ran"
    for folder in (pipeline, pipeline / "vae", pipeline / "text_encoder"):
        (folder / "foreign.py").write_text(CODE.format(mark=str(mark)), encoding="utf-8")
    monkeypatch.chdir(pipeline)
    FOREIGN[kind](pipeline)
    with contextlib.suppress(DiffcError):  # a name that counts for nothing may be there
        open_pipeline(locate(str(pipeline)), dtype=torch.float32, fix="x", transformer=None)
    assert not mark.exists()
