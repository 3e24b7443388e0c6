"""A kill, or a disk that is full or read-only from then on, at every single step of what writes: nothing is half."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffc.artifact.folder import staging, write_manifest
from diffc.cli.main import run
from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from passes.base import PassError
from passes.files.atomic import write_bytes
from tests.artifact.manifests import described
from tests.faults.steps import FULL, failed_at, killed_at
from tests.faults.test_places import model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs copies of this process")


def artifact(folder: Path, *, old: bool = False) -> None:
    with staging(folder / "art", force=True, key="k") as unfinished:
        (unfinished / "model.onnx").write_bytes(b"old" if old else b"new" * 1000)
        write_manifest(unfinished, described(targets={"ort": "model.onnx"}), {})


def checkpoint(folder: Path, *, old: bool = False) -> None:
    static = {"num_bits": 8, "axis": 0, "block_sizes": None, "type": "static"}
    settings = {"a.weight_quantizer": {**static, "unsigned": False, "narrow_range": True}}
    amax = {"a.weight_quantizer": np.full((4, 1), 0.25 if old else 0.5, np.float32)}
    Checkpoint("sd3", "int8", {"_class_name": "X"}, settings, amax, "source").save(folder / "art")


def optimized(folder: Path, *, old: bool = False) -> int:
    if old:
        return run(["opt", str(folder.parent / "other.onnx"), "-p", "remove-unused", "-o", _output(folder)])
    force = ["--force"] if (folder / "o.onnx").exists() else []
    return run(["opt", str(folder.parent / "in.onnx"), "-p", "remove-unused", "-o", _output(folder), *force])


def slimmed(folder: Path, *, old: bool = False) -> int:
    artifact(folder, old=True) if old else artifact(folder.parent)
    return 0 if old else run(["slim", str(folder.parent / "art"), "-o", str(folder / "art"), "--force"])


def small_file(folder: Path, *, old: bool = False) -> None:
    write_bytes(folder / "art", b"old" if old else b"new" * 1000)


def _output(folder: Path) -> str:
    return str(folder / "o.onnx")


WORKS = (artifact, checkpoint, optimized, slimmed, small_file)
Contents = dict[str, str]


@dataclass
class Ground:
    """A folder with what was there before, and what it holds before and after `work`."""

    folder: Path
    work: Callable[[Path], Any]
    before: Contents
    after: Contents

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        shutil.copytree(self.folder.with_name("kept"), self.folder)

    def whole(self) -> Contents:
        """What has a final name; a file of weights that no model reads counts for nothing."""
        found = {name: text for name, text in contents(self.folder).items() if not unfinished(name)}
        if "o.onnx" not in found:
            found.pop("o.onnx_data", None)
        return found


def contents(folder: Path) -> Contents:
    """The hash of every file in `folder` by its name."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def unfinished(name: str) -> bool:
    return name.startswith(".") or name.endswith((".partial", ".journal"))


def cases() -> list[Any]:
    """Each work onto nothing and onto something older; most take half a minute, since each step starts a process."""
    return [
        pytest.param(
            (work, old),
            id=f"{work.__name__}-{'over' if old else 'new'}",
            marks=() if old and work in (artifact, small_file) else pytest.mark.slow,
        )
        for work in WORKS
        for old in (False, True)
    ]


@pytest.fixture(params=cases())
def ground(request: pytest.FixtureRequest, tmp_path: Path) -> Ground:
    work, old = request.param
    folder = tmp_path / "place"
    folder.mkdir()
    model(tmp_path, "in.onnx", "in.bin")
    model(tmp_path, "other.onnx", "other.bin")
    (tmp_path / "other.bin").write_bytes(np.ones((64, 64), np.float32).tobytes())
    if old:
        assert not work(folder, old=True)
    shutil.copytree(folder, tmp_path / "kept")
    before = contents(folder)
    assert not work(folder)
    after = contents(folder)
    assert after not in ({}, before)
    return Ground(folder, work, before, after)


def test_a_kill_leaves_the_old_or_the_new_and_the_same_again_ends_it(ground: Ground) -> None:
    number = 1
    while True:
        ground.restore()
        if not killed_at(lambda: ground.work(ground.folder), number):
            break
        found = ground.whole()
        assert found in (ground.before, ground.after, {} if ground.work is optimized else None), (
            number,
            found,
        )
        assert not ground.work(ground.folder), number
        assert contents(ground.folder) == ground.after, number
        number += 1
    assert number > 2


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_disk_that_says_no_is_one_message_and_nothing_is_half(ground: Ground, error: int) -> None:
    number = 1
    while True:
        ground.restore()
        reached, code, said = failed_at(lambda: told(ground), number, error)
        found = ground.whole()
        assert found in (ground.before, ground.after, {} if ground.work is optimized else None), (
            number,
            found,
        )
        if not reached:
            break
        if code:  # what is only swept away may stay
            assert (code, said.count("error: ")) == (1, 1), (number, said)
            assert "Fix: " in said, (number, said)
            assert "Traceback" not in said, (number, said)
            assert "has a bug" not in said, (number, said)
            if error in FULL:
                assert not [name for name in contents(ground.folder) if unfinished(name)], number
        assert not ground.work(ground.folder), number
        assert contents(ground.folder) == ground.after, number
        number += 1
    assert number > 2


def told(ground: Ground) -> int:
    """The work as a command: what it raises is reported as the command line does."""
    from diffc.cli.main import _report

    try:
        return ground.work(ground.folder) or 0
    except (OSError, DiffcError, PassError) as error:
        return _report(error, False, [])
