"""Progress: what is logged, how parts are numbered, and that an estimate moves and never claims to be done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import pytest

from diffc.progress import LOG, Logged, Parts, Silent, estimated


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What the logger of the progress is told while a test runs."""
    messages: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, level = Kept(), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    yield messages
    LOG.removeHandler(handler)
    LOG.setLevel(level)


def test_stages_and_notes_are_logged(said: list[str]) -> None:
    with Logged().stage("fold") as update:
        update(1, 2)
    Logged().note("3 nodes")
    with pytest.raises(KeyError), Logged().stage("write"):
        raise KeyError("x")
    assert [text.partition(" (")[0] for text in said] == [
        "fold ...",
        "fold",
        "3 nodes",
        "write ...",
        "write: stopped by KeyError",
    ]


def test_parts_are_numbered_and_those_left_out_are_not(said: list[str]) -> None:
    parts = Parts(Logged(), ("trace", "write"))
    for name in ("write", "build"):
        with parts[name].stage(name):
            pass
    parts["trace"].note("a note")
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


def test_silence(capfd: pytest.CaptureFixture[str], said: list[str]) -> None:
    with Silent().stage("x") as update:
        update(1, 1)
        Silent().note("y")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert said == []
