"""Stores: whole folders through fsspec, names that stay inside, and calibrations that are lent whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffc.artifact.folder import MANIFEST
from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.folder import TENSORS
from diffc.sweep.store import SharedCalibrations, Store, fetch_artifact, stored_manifest


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return Store((tmp_path / "store").as_uri())
    return Store(f"memory://{tmp_path.name}/store")


def artifact(folder: Path, **changed: Any) -> Path:
    """The least that Artifact.load takes."""
    (folder / "engines").mkdir(parents=True)
    contents = {"model.onnx": b"graph", "engines/a.engine": b"engine"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    value = {"name": "x", "dtype": "FLOAT", "dims": [1]}
    manifest = {
        "schema": 1, "files": files, "model": {"name": "m"}, "format": "fp8", "targets": {"ort": "model.onnx"},
        "inputs": [value], "outputs": [value], "profile": [], "engines": [], **changed,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_an_artifact_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    assert stored_manifest(store, "cell") is None
    store.put(made, "cell", MANIFEST)
    found = fetch_artifact(store, "cell", tmp_path / "back")
    assert found.manifest == stored_manifest(store, "cell") == json.loads((made / MANIFEST).read_text())
    assert (tmp_path / "back/engines/a.engine").read_bytes() == b"engine"


def test_an_artifact_that_is_not_whole_is_not_there(store: Store, tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    (made / "model.onnx").write_bytes(b"other")  # of the same size: seen when it is fetched
    store.put(made, "cell", MANIFEST)
    with pytest.raises(DiffcError, match="was changed after the compile"):
        fetch_artifact(store, "cell", tmp_path / "back")
    (made / "model.onnx").write_bytes(b"longer than that")
    store.put(made, "cell", MANIFEST)
    assert stored_manifest(store, "cell") is None


def test_a_record_that_leads_out_is_refused(store: Store, tmp_path: Path) -> None:
    made = artifact(tmp_path / "made")
    store.put(made, "cell", MANIFEST)
    with pytest.raises(DiffcError, match="lies outside"):
        store.get("cell", tmp_path / "back", ["../../outside"])
    assert not (tmp_path.parent / "outside").exists()


def test_a_damaged_manifest_is_one_message(store: Store, tmp_path: Path) -> None:
    store.put(artifact(tmp_path / "made", format=3), "cell", MANIFEST)
    with pytest.raises(DiffcError, match=r"cell/manifest\.json is damaged.*format"):
        stored_manifest(store, "cell")


@pytest.mark.parametrize("url", ["nosuch://a/b", "s3://bucket/folder"])
def test_an_address_that_cannot_be_opened_is_one_message(url: str) -> None:
    with pytest.raises(DiffcError, match=f"cannot open the store {url}"):
        Store(url)


def checkpoint() -> Checkpoint:
    own = {"axis": None, "block_sizes": None, "narrow_range": False, "num_bits": [4, 3], "type": "static"}
    settings: Any = {"layer.input_quantizer": own | {"unsigned": False}}
    return Checkpoint("sd3", "fp8", {}, settings, {"layer.input_quantizer": np.ones(1, np.float32)})


def test_a_calibration_is_lent_as_it_was_kept(store: Store, tmp_path: Path) -> None:
    shared = SharedCalibrations(store)
    assert not shared.known("key")
    assert not shared.lend("key", tmp_path / "lent")
    checkpoint().save(tmp_path / "made")
    shared.keep("key", tmp_path / "made")
    assert shared.known("key")
    assert not shared.known("other")
    assert shared.lend("key", tmp_path / "lent")
    for file in (tmp_path / "made").iterdir():
        assert (tmp_path / "lent" / file.name).read_bytes() == file.read_bytes()


def test_a_damaged_calibration_is_not_lent(store: Store, tmp_path: Path) -> None:
    shared = SharedCalibrations(store)
    checkpoint().save(tmp_path / "made")
    (tmp_path / "made" / TENSORS).write_bytes(b"cut off")
    shared.keep("key", tmp_path / "made")
    assert not shared.lend("key", tmp_path / "lent")
    assert not (tmp_path / "lent").exists()
