"""What a compile keeps of its passes and stages: written, hashed where it is the same every time, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.artifact.folder import RUN, Artifact, write_manifest
from diffc.artifact.records import PASSES, read_passes, read_run, save_passes
from diffc.compile.recorded import Recorded
from diffc.errors import DiffcError
from diffc.progress import Part, Silent
from passes.base import Refusal
from passes.pipeline import PassRecord
from tests.artifact.manifests import described

REFUSALS = (Refusal("a/MatMul", "too wide"), Refusal("b/MatMul", "too wide"), Refusal("c/Add", "no bias"))
RECORD = PassRecord("merge-x", 2, 0.25, 9, 7, ("a note",), REFUSALS, "structure", "ort")


def artifact(folder: Path, recorded: Recorded) -> Artifact:
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    save_passes([RECORD], folder)
    recorded.save(folder, ())
    write_manifest(folder, described(targets={"ort": "model.onnx"}), {})
    return Artifact.load(folder)


@pytest.fixture
def recorded() -> Recorded:
    recorded = Recorded(Silent())
    with Part(recorded, 2, 6).stage("trace"):
        held = bytearray(64 << 20)
        held[:] = b"x" * len(held)
    return recorded


def test_a_pass_is_kept_with_its_refusals_by_reason(tmp_path: Path, recorded: Recorded) -> None:
    (entry,) = read_passes(artifact(tmp_path / "a", recorded))
    assert entry == {
        "name": "merge-x",
        "graph": "ort",
        "changed": 2,
        "nodes_before": 9,
        "nodes_after": 7,
        "notes": ["a note"],
        "refused": [
            {"reason": "too wide", "nodes": ["a/MatMul", "b/MatMul"]},
            {"reason": "no bias", "nodes": ["c/Add"]},
        ],
        "check": "structure",
    }


def test_stages_have_seconds_and_the_memory_that_was_held(tmp_path: Path, recorded: Recorded) -> None:
    run = read_run(artifact(tmp_path / "a", recorded))
    assert run is not None
    (stage,) = run["stages"]
    assert stage["title"] == "trace"
    assert 0 < stage["seconds"] <= run["seconds"]
    assert stage["memory"] > 64 << 20


def test_times_are_in_no_manifest_and_passes_are_hashed(tmp_path: Path, recorded: Recorded) -> None:
    files = artifact(tmp_path / "a", recorded).manifest["files"]
    assert PASSES in files
    assert RUN not in files
    other = Recorded(Silent())
    with other.stage("trace"):
        pass
    assert artifact(tmp_path / "b", other).manifest["files"] == files


def test_a_copy_without_records_and_a_damaged_one(tmp_path: Path, recorded: Recorded) -> None:
    made = artifact(tmp_path / "a", recorded)
    (made.folder / RUN).write_text('{"schema": 1, "seconds": -1, "stages": []}')
    with pytest.raises(DiffcError, match=r"run\.json is damaged.*seconds"):
        read_run(made)
    (made.folder / PASSES).unlink()
    (made.folder / RUN).unlink()
    copy = Artifact.load(made.folder)
    assert read_passes(copy) == []
    assert read_run(copy) is None
