"""The artifact remembers its model: found from any folder, and told from another one in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffc.artifact.folder import Artifact
from diffc.artifact.model import compiled_model, remembered
from diffc.commands.bench.run import BenchRequest
from diffc.commands.bench.run import plan as bench_plan
from diffc.commands.package.parts import find_parts
from diffc.commands.pipeline_of import pipeline_source
from diffc.commands.relora import ReloraRequest, relora_request
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import materialize
from diffc.models.sources.locate import locate
from diffc.validate.comparisons import torch_reference_of


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return Path(shutil.copytree(materialize("tiny-sd3"), tmp_path / "models" / "mine"))


def made(pipeline: str) -> Artifact:
    """What commands read of an artifact that was compiled from `pipeline`."""
    source = locate(pipeline)
    shape = {"batch": 1, "height": 64, "width": 64, "text": 8}
    return Artifact(
        Path("art"),
        {
            "format": "none",
            "dtype": "float16",
            "files": {},
            "engines": [],
            "profile": {"minimum": shape, "optimum": shape, "maximum": shape},
            "model": {"family": "sd3", "config": dict(source.config), "fingerprint": source.fingerprint},
            "request": {"model": remembered(pipeline)},
        },
    )


DOORS: dict[str, tuple[str, Callable[[Artifact], object]]] = {
    "generate": ("--pipeline DIR", lambda a: pipeline_source(a, None)),
    "validate": ("--model DIR", torch_reference_of),
    "bench": ("--model DIR", lambda a: bench_plan(a, BenchRequest(a.folder))),
    "relora": ("--model DIR", lambda a: relora_request(a, ReloraRequest(a.folder, Path("new")))),
    "package": ("--components DIR", lambda a: find_parts(a, None, None)),
}


def test_it_is_found_from_another_folder(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pipeline.parent)
    artifact = made("mine")
    monkeypatch.chdir(pipeline.parents[1])
    assert artifact.manifest["request"]["model"] == str(pipeline)
    assert compiled_model(artifact, None, "--model DIR").pipeline_dir == pipeline
    assert remembered("tiny-sd3") == "tiny-sd3"
    assert remembered("owner/name") == "owner/name"


@pytest.mark.parametrize("door", DOORS)
def test_every_command_says_where_it_was_and_what_to_give(door: str, pipeline: Path) -> None:
    artifact, (option, use) = made(str(pipeline)), DOORS[door]
    pipeline.rename(pipeline.with_name("moved"))
    with pytest.raises(DiffcError) as error:
        use(artifact)
    assert f"art was compiled from {pipeline}, which is not there now" in error.value.what
    assert option in error.value.fix
    if door == "relora":  # a compile, which says so itself
        return
    pipeline.mkdir()
    with pytest.raises(DiffcError, match="and the model cannot be read there now") as error:
        use(artifact)
    assert option in error.value.fix


def test_a_lora_that_was_moved_is_named_and_not_taken_for_the_model(pipeline: Path) -> None:
    artifact, lora = made(str(pipeline)), pipeline.with_name("style.safetensors")
    artifact.manifest["model"]["loras"] = [{"file": "style.safetensors", "path": str(lora)}]
    for given in (None, str(pipeline)):
        with pytest.raises(DiffcError, match="was compiled with the LoRA") as error:
            compiled_model(artifact, given, "--model DIR")
        assert f"{lora}, which is not there now" in error.value.what
        assert "--model" not in error.value.fix


@pytest.mark.parametrize("door", [door for door in DOORS if door != "relora"])
def test_every_command_refuses_other_weights_in_its_place(door: str, pipeline: Path) -> None:
    artifact, (option, use) = made(str(pipeline)), DOORS[door]
    (file,) = (pipeline / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].size)
    tensors[name] = (tensors[name] * np.float16(1.5)).astype(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(DiffcError, match="its weights differ") as error:
        use(artifact)
    assert option in error.value.fix


def test_a_place_that_was_given_counts_even_with_other_weights(pipeline: Path) -> None:
    artifact = made(str(pipeline))
    assert compiled_model(artifact, "tiny-sd35", "--model DIR").name == "tiny-sd35"
    with pytest.raises(DiffcError, match="nothing reads the model 'nowhere'") as error:
        compiled_model(artifact, "nowhere", "--model DIR")
    assert "--model DIR" in error.value.fix


def test_an_older_artifact_without_a_fingerprint_is_used(pipeline: Path) -> None:
    artifact = made(str(pipeline))
    del artifact.manifest["model"]["fingerprint"]
    assert compiled_model(artifact, None, "--model DIR").pipeline_dir == pipeline
