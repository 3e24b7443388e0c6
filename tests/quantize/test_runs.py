"""How long a calibration takes."""

from __future__ import annotations

import pytest

from diffc.quantize import runs
from diffc.quantize.runs import Estimate, duration


def test_the_estimate_is_told_once_and_leaves_out_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notes, steps = [100.0], list[str](), list[tuple[int, int]]()
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    estimate = Estimate(lambda done, total: steps.append((done, total)), notes.append)
    for step, seconds in enumerate((30.0, 4.0, 6.0, 50.0), 1):
        clock[0] += seconds
        estimate(step, 1000)
    assert notes == ["calibration takes about 1 h 23 min: 1000 steps of 5 s"]
    assert steps == [(step, 1000) for step in (1, 2, 3, 4)]


def test_a_short_calibration_is_worth_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, notes = [0.0], list[str]()
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    estimate = Estimate(lambda done, total: None, notes.append)
    for step in range(1, 20):
        clock[0] += 2.0
        estimate(step, 20)
    assert notes == []


@pytest.mark.parametrize(("seconds", "words"), [(5, "1 min"), (2400, "40 min"), (7800, "2 h 10 min")])
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == f"about {words}"
