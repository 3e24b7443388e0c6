"""A named pipe, a folder or a link in a circle where a file belongs: one error at each door, and nobody waits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffc.artifact.folder import Artifact
from diffc.cache.plan import CachePlan
from diffc.errors import DiffcError
from diffc.models.single.files import read_file
from diffc.models.sources.locate import locate
from diffc.quantize.checkpoint import Checkpoint
from passes.base import PassError
from passes.storage import load
from passes.weights.lora.file import read_adapter
from tests.models.sources.folders import FILE, FLUX


def model(folder: Path) -> Any:
    """A model folder whose weights or config are what the test made of them."""
    if not os.path.lexists(folder / "config.json"):
        (folder / "config.json").write_text(json.dumps(FLUX))
    return locate(str(folder))


DOORS: dict[str, Callable[[Path], Any]] = {
    "m.onnx": lambda p: load(p),
    "m.gguf": read_file,
    "m.ckpt": read_file,
    "m.safetensors": read_file,
    "l.safetensors": read_adapter,
    "plan.yaml": CachePlan.load,
    "plan.json": CachePlan.load,
    "manifest.json": lambda p: Artifact.load(p.parent),
    "checkpoint.json": lambda p: Checkpoint.load(p.parent),
    "config.json": lambda p: model(p.parent),
    FILE: lambda p: model(p.parent),
}


def pipe(path: Path) -> None:
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders, and links need a right")
@pytest.mark.parametrize("kind", [pipe, Path.mkdir, circle])
@pytest.mark.parametrize("name", DOORS)
def test_what_is_no_file_is_refused_at_once(name: str, kind: Callable[[Path], None], tmp_path: Path) -> None:
    kind(tmp_path / name)
    with pytest.raises((DiffcError, PassError)) as told:
        DOORS[name](tmp_path / name)
    assert "Fix: " in str(told.value)
