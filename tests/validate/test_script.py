"""What --script writes repeats the comparisons without diffc."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffc.cli.main import run
from diffc.commands.validate import ValidateRequest, validate_artifact
from tests.cli_helpers import Capture, refusal
from tests.conftest import Cell, Cells
from tests.validate.damage import SMALL


@pytest.fixture(scope="module")
def fp8(compiled: Cells) -> Cell:
    return compiled("tiny-sd3", "fp8")


def test_the_script_repeats_it_without_diffc(fp8: Cell, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "script"
    assert run(["validate", str(fp8.folder), "--shape", SMALL, "--script", str(folder)]) == 0
    lines = (folder / "run.sh").read_text().splitlines()
    (unrounded,) = (line for line in lines if "model-unrounded.onnx" in line)
    assert "diffc" not in "".join(p.read_text() for p in folder.glob("*.py")).replace("diffc validate", "")
    assert polygraphy(unrounded, folder).returncode == 0
    outputs, other = (
        next(p for p in folder.glob(f"b1-*{kind}*-reference.json")) for kind in ("unrounded", "float32")
    )
    shutil.copy(other, outputs)  # the rounded outputs: off by several per cent
    failed = polygraphy(unrounded, folder)
    assert failed.returncode != 0
    assert "relative L2 error" in failed.stdout
    error = refusal(["validate", str(fp8.folder), "--script", str(folder)], folder, capsys)
    assert "not empty" in error


def polygraphy(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one line of run.sh, and so that diffc cannot be imported."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    (folder / "diffc.py").write_text("raise ImportError('without diffc')")
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_run_sh_is_a_shell_script_that_stops_at_the_first_failure(fp8: Cell, tmp_path: Path) -> None:
    folder = tmp_path / "script"
    validate_artifact(ValidateRequest(fp8.folder, shapes=(SMALL,)), script=folder)
    text = (folder / "run.sh").read_text()
    assert text.startswith("#!/bin/sh\nset -e\n")
    models = {*fp8.artifact.manifest["targets"].values()}
    assert text.count("polygraphy run ") == 3 * len(models)
    assert subprocess.run(["sh", "-n", "run.sh"], cwd=folder, check=False).returncode == 0
