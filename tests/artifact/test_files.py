"""Files that an artifact may name: those in its folder that its manifest lists."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffc.artifact.files import check_files, listed
from diffc.errors import DiffcError

MANIFEST: dict[str, Any] = {
    "files": {"model.onnx": {}, "model.onnx_data": {}, "engines/a.engine": {}, "model-reuse.onnx": {}},
    "targets": {"ort": "model.onnx"},
    "engines": [{"file": "engines/a.engine", "weights": "model.onnx_data"}, {"file": "engines/a.engine"}],
    "cache": {"models": [{"files": {"ort": "model-reuse.onnx"}}]},
}


def test_a_manifest_that_lists_what_it_uses(tmp_path: Path) -> None:
    check_files(tmp_path, MANIFEST)
    check_files(tmp_path, {"files": {}})
    assert listed(tmp_path, MANIFEST, "model.onnx") == tmp_path / "model.onnx"


def target(manifest: Any, name: str) -> None:
    manifest["targets"]["ort"] = name


def engine(manifest: Any, name: str) -> None:
    manifest["engines"][1]["file"] = name


def engine_weights(manifest: Any, name: str) -> None:
    manifest["engines"][0]["weights"] = name


def cache_model(manifest: Any, name: str) -> None:
    manifest["cache"]["models"][0]["files"]["ort"] = name


def file(manifest: Any, name: str) -> None:
    manifest["files"][name] = {}


@pytest.mark.parametrize("place", [target, engine, engine_weights, cache_model, file])
@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "engines/../../x", "C:\\x", "gone.onnx"])
def test_names_that_lead_out_or_are_not_listed(
    place: Callable[[Any, str], None], name: str, tmp_path: Path
) -> None:
    manifest = copy.deepcopy(MANIFEST)
    place(manifest, name)
    if place is file and name == "gone.onnx":
        check_files(tmp_path, manifest)  # that a file is missing is found out when it is needed
        return
    with pytest.raises(DiffcError) as raised:
        check_files(tmp_path, manifest)
    said = "lists no gone.onnx" if name == "gone.onnx" else "names a file outside the artifact"
    assert said in str(raised.value)
    assert raised.value.fix
