"""What a sweep shows: a table on a terminal, lines elsewhere, and nothing that a name could say to the terminal."""

from __future__ import annotations

import io
from pathlib import Path

from diffc.sweep.cells import Axes, Cell
from diffc.sweep.job import Job, Task
from diffc.sweep.live import Progress, cells_table
from diffc.sweep.prepare import row_of
from diffc.sweep.request import Steps
from diffc.sweep.rows import DONE, FAILED, Row
from diffc.terminal_text import Screen
from tests.sweep.test_prepare import sweep_of

GOOD, BAD = Cell("m", "fp8", 89), Cell("m", "int8", 89)


def row(cell: Cell, status: str, message: str = "") -> Row:
    sizes, errors = {"weights": 2_000_000, "engines": 0}, {"float16": 0.01, "float32": 0.002}
    return row_of(
        cell, "float16", status=status, message=message, attempt=1, seconds=130.0, sizes=sizes, errors=errors
    )


def job(folder: Path) -> Job:
    sweep = sweep_of(folder, Axes(["m"], ["fp8"]))
    tasks = tuple(Task(cell, cell.request(sweep.base, folder), "float16", 1) for cell in (GOOD, BAD))
    return Job(tasks, 1, "g", "", folder, "token", "", "", Steps(), "code")


def told(progress: Progress, screen: Screen, folder: Path) -> str:
    assert isinstance(screen.file, io.StringIO)
    with progress:
        progress.known([row(Cell("m", "none"), DONE)], 2)
        progress.begun(job(folder))
        progress.row(row(GOOD, DONE))
        progress.row(row(BAD, FAILED, "no [red]way\x1b[2J\n  Fix: none"))
        progress.tick()
    return screen.file.getvalue()


def test_a_log_gets_a_line_for_each_event(tmp_path: Path) -> None:
    screen = Screen(file=io.StringIO())
    text = told(Progress(screen), screen, tmp_path)
    assert "cells: 1, left to do: 0, workers: 2" in text
    assert "given to the workers: m-fp8-sm89, m-int8-sm89" in text
    assert "m-fp8-sm89: done (2 min 10 s)" in text
    assert "m-int8-sm89: failed (2 min 10 s): no [red]way\\x1b[2J" in text
    assert "\x1b" not in text


def test_a_terminal_gets_a_table(tmp_path: Path) -> None:
    screen = Screen(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    text = told(Progress(screen), screen, tmp_path)
    assert "2 done, 1 failed" in text
    assert text.index("with the workers") < text.index("2 done, 1 failed")
    assert "\x1b[2J" not in text


def test_quiet_says_nothing(tmp_path: Path) -> None:
    screen = Screen(file=io.StringIO())
    assert told(Progress(screen, quiet=True), screen, tmp_path) == ""


def test_the_last_table_has_the_figures_of_every_cell() -> None:
    screen = Screen(file=io.StringIO(), width=120)
    screen.print(cells_table([row(GOOD, DONE), row(BAD, FAILED)]))
    assert isinstance(screen.file, io.StringIO)
    lines = [line.split() for line in screen.file.getvalue().splitlines() if "m-fp8" in line]
    assert lines == [["m-fp8-sm89", "done", "2", "min", "10", "s", "-", "2.0", "MB", "-", "1.0e-02"]]
