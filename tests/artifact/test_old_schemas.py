"""Artifacts of older versions are read: every command finds what it needs in a stored manifest of each schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffc.artifact.folder import SCHEMA, Artifact
from diffc.backends.tensorrt.run import pick_engine
from diffc.cli.main import run
from diffc.commands.bench.run import BenchRequest
from diffc.commands.bench.run import plan as bench_plan
from diffc.commands.doctor_run.cases import cases
from diffc.commands.generate import usual_size
from diffc.models.spec import Shape
from diffc.runtime.load import resolve, signature_of
from tests import DATA
from tests.cli_helpers import Capture

STORED = {schema: DATA / f"manifest-schema-{schema}.json" for schema in range(1, SCHEMA + 1)}


@pytest.fixture(params=STORED)
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    """An artifact with that manifest, whose files have the sizes that it lists and nothing in them."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    shutil.copy(STORED[request.param], folder / "manifest.json")
    for name, entry in json.loads(STORED[request.param].read_text("utf-8"))["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(entry["bytes"])
    return Artifact.load(folder)


def test_a_manifest_of_every_schema_is_kept() -> None:
    assert all(path.is_file() for path in STORED.values()), (
        "store one of the last version before SCHEMA rises"
    )
    assert [json.loads(path.read_text("utf-8"))["schema"] for path in STORED.values()] == [*STORED]


def test_what_runs_it_is_found(artifact: Artifact) -> None:
    target, device = resolve(artifact, "ort")
    signature = signature_of(artifact, target)
    assert device.type == "cpu"
    assert signature.inputs[0].name == "hidden_states"
    sizes = {"batch": 2, "height": 8, "width": 8, "text": 9}
    shapes = {v.name: tuple(sizes[d] if isinstance(d, str) else d for d in v.dims) for v in signature.inputs}
    assert signature.check(shapes) == sizes
    assert pick_engine(artifact.engines, "trt-rtx", 120)["file"] == "engines/trt-rtx-sm120.engine"
    assert {case.target for case in cases(artifact)} == {"trt-rtx", "ort"}


def test_commands_read_their_defaults_from_it(artifact: Artifact, capsys: Capture) -> None:
    assert usual_size(artifact.manifest, 128) == (128, 128)
    _, shapes = bench_plan(artifact, BenchRequest(artifact.folder))
    assert shapes == [Shape(2, 128, 128, 333)]
    assert run(["inspect", str(artifact.folder)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "tiny-sd3" in shown
    assert "for SM89 (RTX 40, L40)" in shown
