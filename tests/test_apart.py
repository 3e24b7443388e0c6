"""Foreign code in a process apart: its answer, its error, and an end to what never ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffc.apart import FORKS, Ended, run_apart
from diffc.errors import UsageError


def answer(a: int, b: int) -> dict[str, int]:
    return {"sum": a + b, "process": os.getpid()}


def fails(kind: str) -> None:
    if kind == "ours":
        raise UsageError("what", fix="mend")
    if kind == "odd":
        raise Odd("a", "b")
    raise ValueError("theirs")


class Odd(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, one: str, other: str):
        super().__init__(f"{one}-{other}")


def spins() -> None:
    while True:
        pass


def grows() -> int:
    return sum(len(bytearray(1 << 26)) for held in [[bytearray(1 << 26) for _ in range(60)]])


def asks() -> int:
    return len(bytearray(1 << 45))


def crashes() -> None:
    os.abort()


def apart(function: Any, *arguments: Any, seconds: float = 1, memory: int = 1 << 28) -> Any:
    return run_apart(function, *arguments, seconds=seconds, memory=memory)


def test_an_answer_and_an_error_come_back() -> None:
    found = apart(answer, 2, 3)
    assert found["sum"] == 5
    assert found["process"] != os.getpid()
    with pytest.raises(UsageError, match="what\n  Fix: mend"):
        apart(fails, "ours")
    with pytest.raises(ValueError, match="theirs"):
        apart(fails, "theirs")
    with pytest.raises(Exception, match="Odd: a-b"):
        apart(fails, "odd")


@pytest.mark.parametrize(
    ("function", "said"),
    [(spins, "did not come to an end within 1 s"), (grows, "memory"), (asks, "memory"), (crashes, "crashed")],
)
def test_what_goes_too_far_is_ended(function: Any, said: str) -> None:
    started = time.monotonic()
    with pytest.raises(Ended, match=said):
        apart(function)
    assert time.monotonic() - started < 30  # of one core that others use as well


def test_a_process_that_starts_anew() -> None:
    """As on Windows and macOS: everything that goes over is pickled, and the imports are made again."""
    found = run_apart(answer, 2, 3, seconds=10, memory=1 << 29, forks=False)
    assert (found["sum"], found["process"] != os.getpid()) == (5, True)
    with pytest.raises(UsageError, match="what\n  Fix: mend"):
        run_apart(fails, "ours", seconds=10, memory=1 << 29, forks=False)
    with pytest.raises(Ended, match="crashed"):
        run_apart(crashes, seconds=10, memory=1 << 29, forks=False)


PARENT = """
import fcntl, sys, time
from diffc.apart import run_apart

def waits():
    open(sys.argv[2], "w").close()
    while True:
        time.sleep(0.1)

held = open(sys.argv[1], "w")
fcntl.flock(held, fcntl.LOCK_EX)
run_apart(waits, seconds=100, memory=1 << 28)
"""


@pytest.mark.skipif(not FORKS, reason="a process that starts anew inherits no file")
def test_a_killed_parent_leaves_no_process_and_no_lock(tmp_path: Path) -> None:
    import fcntl

    lock, began = tmp_path / "lock", tmp_path / "began"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(lock), str(began)])
    _until(began.exists)
    child = psutil.Process(parent.pid).children()[0]
    os.kill(child.pid, signal.SIGSTOP)  # it cannot see the end of its parent
    parent.kill()
    parent.wait()
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.send_signal(signal.SIGCONT)
    _until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
