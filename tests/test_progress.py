"""Progress: what is logged, how parts are numbered, and that an estimate moves and never claims to be done."""

from __future__ import annotations

import logging
import time

import pytest

from diffc.progress import Logged, Parts, Silent, estimated


def test_stages_and_notes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diffc.progress"):
        with Logged().stage("fold") as update:
            update(1, 2)
        Logged().note("3 nodes")
        with pytest.raises(KeyError), Logged().stage("write"):
            raise KeyError("x")
    said = [record.getMessage().partition(" (")[0] for record in caplog.records]
    assert said == ["fold ...", "fold", "3 nodes", "write ...", "write: stopped by KeyError"]


def test_parts_are_numbered_and_those_left_out_are_not(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(Logged(), ("trace", "write"))
    with caplog.at_level(logging.INFO, "diffc.progress"):
        for name in ("write", "build"):
            with parts[name].stage(name):
                pass
        parts["trace"].note("a note")
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "[2/2] write ..."
    assert said[2] == "build ..."
    assert said[4] == "a note"


@pytest.mark.parametrize("expected", [0.4, 60.0])
def test_an_estimate_moves_and_ends_at_its_end(expected: float) -> None:
    seen: list[tuple[int, int]] = []
    with estimated(lambda done, total: seen.append((done, total)), expected, start=0.5, end=0.8):
        time.sleep(1.0)
    *moving, last = (done for done, _ in seen)
    assert last == 800
    assert moving == sorted(moving)
    assert 500 <= moving[0] <= moving[-1] < 800
    assert len(moving) >= 2


def test_an_estimate_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), estimated(lambda done, total: None, 1.0):
        raise ZeroDivisionError


def test_silence(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), Silent().stage("x") as update:
        update(1, 1)
        Silent().note("y")
    captured = capfd.readouterr()
    assert captured.out + captured.err + caplog.text == ""
