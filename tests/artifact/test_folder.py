"""The artifact folder: complete or absent, and honest about its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffc import output_folders
from diffc.artifact import folder as folder_module
from diffc.artifact.folder import MANIFEST, Artifact, check_output, file_sha256, staging, write_manifest
from diffc.errors import DiffcError
from tests.artifact.manifests import described

FILES = {"model.onnx": b"graph", "model.onnx_data": bytes(range(256)) * 50, "engines/a.engine": b"engine"}


def fill(folder: Path, **content: Any) -> dict[str, Any]:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return write_manifest(folder, described(**{"format": "fp8", **content}), {})


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with staging(tmp_path / "out", force=False) as folder:
        fill(folder)
    return tmp_path / "out"


def test_a_finished_artifact_loads_and_verifies(artifact: Path) -> None:
    loaded = Artifact.load(artifact)
    assert loaded.model == artifact / "model.onnx"
    assert loaded.manifest["format"] == "fp8"
    assert {name: entry["bytes"] for name, entry in loaded.manifest["files"].items()} == {
        name: len(data) for name, data in FILES.items()
    }
    loaded.verify()
    assert [p.name for p in artifact.parent.iterdir()] == ["out"]


def test_equal_content_gives_equal_manifests(tmp_path: Path) -> None:
    written = []
    for content in ({"a": 1, "b": [2]}, {"b": [2], "a": 1}):
        folder = tmp_path / str(len(written))
        folder.mkdir()
        fill(folder, **content)
        written.append((folder / MANIFEST).read_bytes())
    assert written[0] == written[1]


def test_known_hashes_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    assert write_manifest(tmp_path, {}, {})["files"]["model.onnx"]["sha256"] == file_sha256(
        tmp_path / "model.onnx"
    )
    assert write_manifest(tmp_path, {}, {"model.onnx": "known"})["files"]["model.onnx"]["sha256"] == "known"


def test_changes_after_the_compile_are_found(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"grapf")
    with pytest.raises(DiffcError, match=r"model\.onnx was changed after the compile"):
        Artifact.load(artifact).verify()
    (artifact / "model.onnx_data").write_bytes(b"short")
    with pytest.raises(DiffcError, match=r"model\.onnx_data is missing or not 12800 bytes"):
        Artifact.load(artifact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is not a diffc artifact"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"schema": 1}', "missing required field `files`"),
        (json.dumps({"schema": 99, "files": {}}), "was written by a newer diffc: it has schema 99"),
        (json.dumps({"schema": 99, "files": {}}), "upgrade diffc"),
        (json.dumps({"schema": 0, "files": {}}), "its schema is 0"),
        (json.dumps({"schema": "1", "files": {}}), "its schema is '1'"),
    ],
)
def test_what_is_no_artifact_is_said(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(DiffcError, match=message):
        Artifact.load(tmp_path)


def test_an_artifact_that_was_moved_is_whole_and_its_old_place_says_so(artifact: Path) -> None:
    moved = artifact.rename(artifact.with_name("moved"))
    Artifact.load(moved).verify()
    with pytest.raises(DiffcError, match="there is nothing at") as error:
        Artifact.load(artifact)
    assert str(artifact) in error.value.what
    assert "where the artifact lies now" in error.value.fix


def test_older_manifests_are_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SCHEMA", folder_module.SCHEMA + 1)
    loaded = Artifact.load(artifact)
    assert loaded.manifest["schema"] == folder_module.SCHEMA - 1
    loaded.verify()


@pytest.mark.parametrize("name", ["engines", "validation", "checkpoint"])
def test_what_no_runtime_reads_may_be_removed_from_a_copy(name: str, tmp_path: Path) -> None:
    with staging(tmp_path / "out", force=False) as folder:
        for extra in ("validation", "checkpoint"):
            (folder / extra).mkdir()
            (folder / extra / "a.json").write_text("{}")
        fill(folder, engines=[{"file": "engines/a.engine", "target": "trt-rtx", "version": "1", "sms": [89]}])
    assert len(Artifact.load(tmp_path / "out").engines) == 1
    removed = [path for path in (tmp_path / "out" / name).iterdir() if path.unlink() is None]
    loaded = Artifact.load(tmp_path / "out")
    loaded.verify()
    assert loaded.missing == (f"{name}/{removed[0].name}",)
    assert len(loaded.engines) == (name != "engines")
    with pytest.raises(DiffcError, match=f"has no {name}/.*left out of this copy"):
        loaded.present(loaded.missing[0])


def test_a_shortened_optional_file_and_a_missing_required_one_are_refused(artifact: Path) -> None:
    (artifact / "engines" / "a.engine").write_bytes(b"eng")
    with pytest.raises(DiffcError, match=r"a\.engine is missing or not 6 bytes"):
        Artifact.load(artifact)
    (artifact / "engines" / "a.engine").write_bytes(FILES["engines/a.engine"])
    (artifact / "model.onnx").unlink()
    with pytest.raises(DiffcError, match=r"model\.onnx is missing"):
        Artifact.load(artifact)


def test_an_error_leaves_nothing_and_keeps_the_old_one(artifact: Path) -> None:
    before = (artifact / MANIFEST).read_bytes()
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), staging(artifact, force=True) as folder:  # noqa: PT012  # the error ends the block
            fill(folder, format="int8")
            raise error
        assert (artifact / MANIFEST).read_bytes() == before
        assert [p.name for p in artifact.parent.iterdir()] == ["out"]


def test_force_replaces_all_of_the_old_one(artifact: Path) -> None:
    (artifact / "leftover").write_text("x")
    with pytest.raises(DiffcError, match="--force"), staging(artifact, force=False):
        pass
    with staging(artifact, force=True) as folder:
        fill(folder, format="int8")
    assert Artifact.load(artifact).manifest["format"] == "int8"
    assert not (artifact / "leftover").exists()
    assert [p.name for p in artifact.parent.iterdir()] == ["out"]


def test_when_the_last_rename_fails_the_old_one_is_put_back(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = (artifact / MANIFEST).read_bytes(), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise PermissionError(13, "in use", str(self))  # as on Windows, when a file in it is open
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    monkeypatch.setattr(output_folders, "exchange", lambda one, other: False)  # Windows has none
    with pytest.raises(PermissionError), staging(artifact, force=True) as folder:
        fill(folder, format="int8")
    assert (artifact / MANIFEST).read_bytes() == before
    assert [p.name for p in artifact.parent.iterdir()] == ["out"]


def test_what_a_killed_compile_left_is_cleared(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    (partial / "engines").mkdir(parents=True)
    (partial / "stale").write_text("x")
    (tmp_path / ".out.lock").write_text("")
    with staging(tmp_path / "out", force=False) as folder:
        assert not list(folder.iterdir())
        fill(folder)
    assert not (tmp_path / "out" / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (
        staging(tmp_path / "out", force=False) as folder,
        pytest.raises(DiffcError, match="another diffc is writing"),
        staging(tmp_path / "out", force=False),
    ):
        pass
    assert not folder.exists() or not list(folder.iterdir())


def test_only_artifacts_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "deep", force=False)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", force=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        for force in (False, True):
            with pytest.raises(DiffcError, match="exists and is not a diffc artifact"):
                check_output(tmp_path / name, force=force)
