"""Running commands and reading what they say, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.cli.main import run

Capture = pytest.CaptureFixture[str]
RTX = ("--target", "trt-rtx")


def listing(folder: Path) -> dict[str, int]:
    """Every file below `folder`, hidden ones too, with its size; folders with -1."""
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")
    }


def refusal(arguments: list[str], folder: Path, capsys: Capture, code: int = 1) -> str:
    """What stderr says of a command that must fail with `code` and leave `folder` as it is."""
    before = listing(folder)
    capsys.readouterr()
    assert run(arguments) == code
    error = capsys.readouterr().err
    assert listing(folder) == before
    assert "Traceback" not in error
    assert error.count("error:") == (0 if "See diffc" in error else 1), error
    assert error.strip()
    return error


def compile_arguments(folder: Path, *more: str, model: str = "tiny-sd3") -> list[str]:
    return ["compile", model, "-o", str(folder / "out"), *more]
