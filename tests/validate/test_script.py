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
from tests import polygraphy_cli
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


@pytest.fixture(scope="module")
def script(fp8: Cell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What --script writes."""
    folder = tmp_path_factory.mktemp("written") / "script"
    validate_artifact(ValidateRequest(fp8.folder, shapes=(SMALL,)), script=folder)
    return folder


def test_an_rtx_pc_gets_a_script_that_builds_and_compares(
    fp8: Cell, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = script
    file = fp8.artifact.manifest["targets"].get("trt-rtx")
    for path in (*folder.glob("*.sh"), *folder.glob("*.py")):
        assert b"\r" not in path.read_bytes()
    for path in folder.glob("*.bat"):
        text = path.read_bytes()
        assert text.count(b"\n") == text.count(b"\r\n") > 3
        assert text.startswith(b'@echo off\r\ncd /d "%~dp0"\r\n')
    batch, shell = ((folder / f"run.{kind}").read_text() for kind in ("bat", "sh"))
    assert batch.count("|| exit /b 1") == shell.count("polygraphy run ") > 0
    if file is None:
        return
    assert "export POLYGRAPHY_USE_TENSORRT_RTX=1\n" in (folder / "rtx.sh").read_text()
    assert b"set POLYGRAPHY_USE_TENSORRT_RTX=1\r\n" in (folder / "rtx.bat").read_bytes()
    profile = fp8.artifact.manifest["profile"]
    for command in polygraphy_cli.lines(folder / "rtx.sh"):
        assert f"timestep:[{profile['maximum']['batch']}]" in command[command.index("--trt-max-shapes") :]
        assert (folder / command[1]).is_file()
        made = folder / "made.py"
        assert polygraphy_cli.status([*command, "--gen-script", str(made)], folder, monkeypatch) == 0
        assert "create_network" in made.read_text() or "NetworkFromOnnxPath" in made.read_text()
        made.unlink()


def test_run_sh_is_a_shell_script_that_stops_at_the_first_failure(fp8: Cell, script: Path) -> None:
    text = (script / "run.sh").read_text()
    assert text.startswith("#!/bin/sh\nset -e\n")
    models = {*fp8.artifact.manifest["targets"].values()}
    assert text.count("polygraphy run ") == 3 * len(models)
    assert subprocess.run(["sh", "-n", "run.sh"], cwd=script, check=False).returncode == 0
