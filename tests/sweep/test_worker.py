"""A job in a process of its own: its rows come back, its death is told, and it does not outlive its worker."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffc.sweep import worker
from diffc.sweep.cells import Axes
from diffc.sweep.job import Job, Task
from diffc.sweep.jobs import rows_of
from diffc.sweep.orphans import ORPHANED
from diffc.sweep.request import Steps
from diffc.sweep.rows import FAILED
from diffc.sweep.runners import Processes
from tests.sweep.test_prepare import sweep_of


def job(folder: Path, code: str = "of another diffc") -> bytes:
    """A job of two cells that no machine takes: its process has another code."""
    sweep = sweep_of(folder, Axes(["tiny-sd3"], ["none", "fp8"]))
    tasks = [Task(cell, cell.request(sweep.base, folder), "float16", 1) for cell in sweep.axes.cells()]
    made = Job(tuple(tasks), 1 << 30, "g", "", folder, "token", "", folder.as_uri(), Steps(), code)
    return pickle.dumps(made)


@pytest.mark.slow  # its process imports torch
def test_the_rows_of_a_job_come_back(tmp_path: Path) -> None:
    runner = Processes(2, 1 << 30, 1, str(tmp_path))
    runner.submit("one", job(tmp_path), 2 << 30)  # more than there is: it gets all
    found: list[Any] = []
    while not found:
        found = runner.finished(0.5)
    runner.close()
    ((name, attempt),) = found
    assert (name, attempt.died, attempt.crashed) == ("one", "", False)
    rows = rows_of(attempt)
    assert [(row.cell, row.status) for row in rows] == [("tiny-sd3-none", FAILED), ("tiny-sd3-fp8", FAILED)]
    assert "has another diffc" in rows[0].message
    assert rows[0].needs == 1 << 30
    assert rows[0].peak_memory
    assert not list(tmp_path.glob("*.txt")), "the log of a process that ended well is kept"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("program", "died", "crashed"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", False),
        ("import os; print('was here', flush=True); os.abort()", "SIGABRT, after: ", True),
        ("raise SystemExit(3)", "exit code 3", False),
    ],
)
def test_how_a_process_died_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, died: str, crashed: bool
) -> None:
    monkeypatch.setattr(worker, "COMMAND", ("-c", program))
    attempt = worker.attempt(b"", 1, str(tmp_path))
    assert attempt.died.startswith(died)
    assert (attempt.crashed, attempt.rows) == (crashed, ())
    assert len(list(tmp_path.glob("*.txt"))) == 1


def test_a_stopped_job_and_what_it_had_started_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    started = (
        "import pathlib, subprocess, sys, time;"
        " p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f" pathlib.Path({str(pids)!r}).write_text(str(p.pid)); time.sleep(600)"
    )
    monkeypatch.setattr(worker, "COMMAND", ("-c", started))
    attempt = worker.attempt(b"", 1, "", lambda: pids.is_file() and bool(pids.read_text()))
    assert attempt.died
    child = int(pids.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_process_ends_itself_when_its_worker_is_gone() -> None:
    program = (
        "import threading, time; from diffc.sweep.orphans import watch;"
        " threading.Thread(target=watch, daemon=True).start(); print('up', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline().strip() == b"up"
        assert process.poll() is None
        process.stdin.close()
        begun = time.monotonic()
        assert process.wait(30) == ORPHANED
        assert time.monotonic() - begun < 20
