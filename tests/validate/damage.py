"""Artifacts that were damaged on purpose, and the requests that look for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import numpy_helper

from diffc.artifact.folder import file_sha256
from diffc.commands.validate import Validated, ValidateRequest, validate_artifact
from tests.conftest import Cell

SMALL = "batch=1,height=64,width=64,text=8"
Damage = Callable[[onnx.ModelProto], None]


def damaged(cell: Cell, folder: Path, damage: Damage) -> Path:
    """A copy of the artifact whose graph was changed, and whose manifest does not tell."""
    copy = shutil.copytree(cell.folder, folder / "damaged")
    model = onnx.load(copy / "model.onnx", load_external_data=False)
    damage(model)
    onnx.save(model, copy / "model.onnx")
    rehash(copy, "model.onnx")
    return Path(copy)


def rehash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    manifest["files"][name] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


def scaled(name: str, factor: float) -> Damage:
    def damage(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((value * factor).astype(value.dtype), name))

    return damage


def validate(folder: Path, **changed: object) -> Validated:
    request = replace(ValidateRequest(folder, shapes=(SMALL,)), **changed)  # type: ignore[arg-type]
    return validate_artifact(request, bisect=True)
