"""A compile that was killed: the next one of the same request takes up calibration and weights, to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from diffc.artifact.folder import RUN, staging
from diffc.artifact.resume import RESUME, mark_calibrated
from diffc.compile import spine
from diffc.compile.calibration import kept_checkpoint
from diffc.compile.plan import check
from diffc.compile.request import CompileRequest, request_key
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError
from diffc.progress import Silent
from passes.weights import journal

FILES = {"checkpoint/checkpoint.json": "{}", "model.onnx_data.partial": "weights", "model.onnx": "graph"}


class Killed(BaseException):
    """Stands for a kill: whoever catches it must leave the disk as it is."""


class Deadly(Silent):
    """Kills in the stage whose title contains `title`, at its n-th update."""

    def __init__(self, title: str, update: int, kill: Callable[[], None]) -> None:
        self.title, self.update, self.kill = title, update, kill
        self.notes, self.count = list[str](), 0

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        def update(done: int, total: int) -> None:
            del done, total
            self.count += self.title in title
            if self.title in title and self.count == self.update:
                self.kill()

        yield update

    def note(self, text: str) -> None:
        self.notes.append(text)


@contextmanager
def killing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Gives a function that ends the block as a kill does: nothing is cleared up on the way out."""
    with monkeypatch.context() as patch:

        def kill() -> None:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            raise Killed

        with pytest.raises(Killed):
            yield kill


def contents(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != RUN}


@pytest.mark.compiles
def test_calibration_and_weights_are_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "EVERY", 1 << 14)
    request = CompileRequest(
        "tiny-sd3",
        tmp_path / "a",
        "fp8",
        ("ort",),
        (),
        prompts=("a fox",),
        steps=1,
        image_size=64,
        skip_validation=True,
    )
    whole = Deadly("write weights", -1, lambda: None)
    compile_model(request, whole)
    expected = contents(tmp_path / "a")
    again = replace(request, output=tmp_path / "b")
    with killing(monkeypatch) as kill:
        compile_model(again, Deadly("write weights", 40, kill))
    left = contents(tmp_path / ".b.partial")
    assert {f"{RESUME}/request", f"{RESUME}/weights.journal", "checkpoint/checkpoint.json"} <= left.keys()
    assert 0 < len(left["model.onnx_data.partial"]) < len(expected["model.onnx_data"])
    monkeypatch.setattr("diffc.compile.quantize.calibrated", lambda *_: pytest.fail("calibrated again"))
    last = Deadly("write weights", -1, lambda: None)
    compile_model(again, last)
    assert contents(tmp_path / "b") == expected
    assert any("taken over" in note for note in last.notes)
    assert 0 < last.count <= whole.count - 35, "all weights were computed again"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_only_an_equal_request_takes_up_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, kept in (("one", True), ("two", False), ("", False)):
        with killing(monkeypatch) as kill, staging(tmp_path / "out", force=True, key="one") as folder:
            for name, text in FILES.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            kill()
        with staging(tmp_path / "out", force=True, key=key) as folder:
            found = {name.removeprefix(f"{RESUME}/") for name in contents(folder)} - {"request"}
            assert found == ({"checkpoint/checkpoint.json", "model.onnx_data.partial"} if kept else set())
            (folder / "manifest.json").write_text(json.dumps({"schema": 1, "files": {}}))
        assert not (tmp_path / "out" / RESUME).exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
@pytest.mark.parametrize("calibrated", [True, False])
def test_an_error_keeps_a_finished_calibration_and_nothing_else(
    calibrated: bool, error: BaseException, tmp_path: Path
) -> None:
    def end(key: str, notes: list[str], wanted: set[str]) -> None:
        with (  # noqa: PT012  # the error ends the block
            pytest.raises((type(error), DiffcError)),
            staging(tmp_path / "out", force=False, key=key, note=notes.append) as folder,
        ):
            assert contents(folder).keys() - {f"{RESUME}/request", f"{RESUME}/calibrated"} == wanted
            for name, text in {**FILES, f"{RESUME}/weights.journal": "x", "engines/a": "x"}.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            if calibrated:
                mark_calibrated(folder)
            raise error

    notes: list[str] = []
    end("one", notes, set())
    kept = {"checkpoint/checkpoint.json"} if calibrated else set()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ([".out.partial"] if calibrated else [])
    marks = {f"{RESUME}/request", f"{RESUME}/calibrated"} if calibrated else set()
    assert contents(tmp_path / ".out.partial").keys() == kept | marks
    assert len(notes) == calibrated
    assert all("the same command goes on with it" in note for note in notes)
    end("one", notes, kept)
    end("two", notes, set())
    with staging(tmp_path / "out", force=False, key="three") as folder:
        assert not contents(folder).keys() - {f"{RESUME}/request"}
        (folder / "manifest.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.compiles
def test_ctrl_c_after_the_calibration_keeps_it_for_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "saved"
    request = CompileRequest(
        "tiny-sd3",
        tmp_path / "a",
        "fp8",
        calibrate="synthetic",
        image_size=64,
        batch_size=1,
        save_checkpoint=saved,
    )

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    first = Deadly("", -1, lambda: None)
    monkeypatch.setattr(spine, "trace", stopped)
    with pytest.raises(KeyboardInterrupt):
        compile_model(request, first)
    assert any("the same command goes on with it" in note for note in first.notes)
    assert contents(saved) == contents(tmp_path / ".a.partial" / "checkpoint") != {}
    shutil.rmtree(saved)
    second = Deadly("", -1, lambda: None)
    monkeypatch.setattr("diffc.compile.quantize.calibrated", lambda *_: pytest.fail("calibrated again"))
    with pytest.raises(KeyboardInterrupt):
        compile_model(request, second)
    assert any("taken over" in note for note in second.notes)
    assert contents(saved) == contents(tmp_path / ".a.partial" / "checkpoint")


def test_a_place_that_cannot_take_the_calibration_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("x")
    with pytest.raises(DiffcError, match="exists and is not a checkpoint"):
        check(CompileRequest("tiny-sd3", tmp_path / "a", "fp8", save_checkpoint=tmp_path / "mine"))
    with pytest.raises(DiffcError, match="format 'none' has no calibration to save"):
        check(CompileRequest("tiny-sd3", tmp_path / "a", save_checkpoint=tmp_path / "new"))


def test_a_calibration_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    assert kept_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.json").write_text("{")
    assert kept_checkpoint(tmp_path) is None
    assert not (tmp_path / "checkpoint").exists()


def test_the_key_follows_all_that_the_result_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "weights.bin"):
        (folder / name).write_text(name)
    request = CompileRequest("m", tmp_path / "a", "fp8")
    key = request_key(request, [folder])
    same = replace(
        request, output=tmp_path / "b", force=True, dump=tmp_path / "dump", save_checkpoint=tmp_path
    )
    assert request_key(same, [folder]) == key
    others = [replace(request, **{name: value}) for name, value in CHANGES.items()]
    keys = {request_key(other, [folder]) for other in others}
    assert len(keys | {key}) == len(others) + 1
    os.utime(folder / "weights.bin", ns=(1, 1))
    assert request_key(request, [folder], "other weights") != key
    changed = request_key(request, [folder])
    assert changed != key
    monkeypatch.setattr("diffc.compile.request.code_of_diffc", lambda: "another version")
    assert request_key(request, [folder]) != changed


CHANGES = {
    "model": "n",
    "format": "int8",
    "targets": ("tensorrt",),
    "dtype": "float32",
    "prompts": ("a fox",),
    "steps": 3,
    "seed": 9,
    "image_size": 64,
    "skip_validation": True,
}
