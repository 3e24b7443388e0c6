"""`polygraphy run` in this process: its own command line, a line of a script at a time."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from polygraphy.logger import G_LOGGER
from polygraphy.tools._main import main


def lines(script: Path) -> list[list[str]]:
    """The arguments of each `polygraphy` command of a run.sh."""
    text = script.read_text(encoding="utf-8")
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("polygraphy ")]


def status(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of `polygraphy ARGUMENTS` in `folder`."""
    monkeypatch.chdir(folder)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return int(main(arguments) or 0)
