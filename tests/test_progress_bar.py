"""Stages drawn: lines in a log, a bar that moves on a terminal, nothing from Python without a terminal."""

from __future__ import annotations

import io
import re

import pytest

from diffc.progress import Logged
from diffc.progress_bar import ProgressBar, default_reporter, duration
from diffc.terminal_text import Screen


def test_a_log_has_a_line_at_the_start_and_one_at_the_end() -> None:
    file = io.StringIO()
    bar = ProgressBar(Screen(file=file, width=80))
    with bar.stage("trace") as update:
        update(1, 2)
        assert file.getvalue() == "  trace ...\n"
    bar.note("a note")
    lines = file.getvalue().splitlines()
    assert re.fullmatch(r"  trace \(\d+\.\d s\)", lines[1])
    assert lines[2:] == ["    a note"]


def test_a_terminal_shows_a_bar_that_moves() -> None:
    file = io.StringIO()
    bar = ProgressBar(Screen(file=file, force_terminal=True, width=80))
    with bar.stage("write weights") as update:
        for done in range(5):
            update(done, 4)
    drawn = file.getvalue()
    assert "100%" in drawn
    assert "write weights" in drawn
    assert re.search(r"write weights.*\d+\.\d s\)", drawn.splitlines()[-1].rpartition("\r")[2])


def test_a_call_from_python_without_a_terminal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = default_reporter()
    assert type(reporter) is Logged
    with reporter.stage("x"):
        reporter.note("y")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.94, "99.9 s"), (100, "1 min 40 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")],
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
