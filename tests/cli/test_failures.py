"""Errors that nobody foresaw: one message with what was done, what was said, what to try; a file for the report."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import diffc.commands.optimize
from diffc.cli.main import run
from diffc.progress import Logged
from tests.cli_helpers import Capture


def in_numpy() -> None:
    with Logged().stage("fold the weights"):
        np.linalg.inv(np.zeros((3, 3)))


def ours() -> None:
    raise KeyError("x\x1b[2J")


def system(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/some/place")

    return fail


def of_a_library() -> None:
    raise OSError("Can't load the config")  # as transformers raises it: no number, no file


def memory() -> None:
    raise MemoryError("Unable to allocate 512 TiB")


def told(fail: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: Capture, code: int = 1) -> str:
    """What the command prints when its work ends so."""
    monkeypatch.setattr(diffc.commands.optimize, "optimize", lambda *args, **kwargs: fail())
    assert run(["opt", "m.onnx", "-p", "remove-unused", "-o", "o.onnx"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n  Fix: ") == 1
    assert "Traceback" not in captured.err
    assert "\x1b" not in captured.err
    return captured.err


def test_what_a_library_says(monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("diffc.cli.failures._OURS", ("diffc", "passes", "tests"))
    text = told(in_numpy, monkeypatch, capsys)
    assert "error: fold the weights: numpy said: LinAlgError: Singular matrix" in text
    (file,) = tmp_path.iterdir()
    assert str(file) in text
    kept = file.read_text(encoding="utf-8")
    assert "in in_numpy" in kept
    assert "diffc opt m.onnx" in kept
    assert "onnxruntime" in kept


def test_a_bug_of_ours_says_how_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("diffc.cli.failures._OURS", ("diffc", "passes", "tests"))
    text = told(ours, monkeypatch, capsys)
    assert "has a bug: KeyError" in text
    assert "report it" in text
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert "--debug shows the traceback" in told(ours, monkeypatch, capsys)


@pytest.mark.parametrize(
    "number",
    [
        errno.ENOSPC,
        errno.EFBIG,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EACCES,
        errno.EROFS,
        errno.EIO,
        errno.ENOENT,
    ],
)
def test_what_the_system_says(number: int, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    text = told(system(number), monkeypatch, capsys)
    assert os.strerror(number) in text
    assert "/some/place" in text


def test_memory_and_errors_without_a_file(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert "Unable to allocate 512 TiB" in told(memory, monkeypatch, capsys)
    text = told(of_a_library, monkeypatch, capsys)
    assert "error: Can't load the config\n" in text
    assert "None" not in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("arguments", [["--help"], ["formats"], ["passes", "\N{SNOWMAN}"]])
def test_a_terminal_that_lacks_letters(encoding: str, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "diffc", *arguments], env=environment, capture_output=True, check=False
    )
    assert done.returncode == (1 if "passes" in arguments else 0)
    assert b"Traceback" not in done.stderr
    assert done.stdout or done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no such device")
def test_a_full_stdout_is_one_message() -> None:
    """It said "No space left on device: None" (F21)."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "diffc", "formats"], stdout=full, stderr=subprocess.PIPE
        )
    said = ended.stderr.decode()
    assert ended.returncode == 1
    assert said == "error: No space left on device\n  Fix: check that place and its room, or name another\n"


def test_nothing_of_a_library_stands_beside_the_error(tmp_path: Path) -> None:
    """ONNX Runtime logged its own lines, and C++ traces, to stderr (F20)."""
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], "m", domain="com.microsoft")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    command = ["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o"), "-q"]
    ended = subprocess.run([sys.executable, "-m", "diffc", *command], capture_output=True, text=True)
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("  Fix: ")
    assert not [line for line in lines if "[E:onnxruntime" in line or ".cc:" in line], ended.stderr
