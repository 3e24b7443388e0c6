"""A worker of a sweep: gives a job to a process of its own, and tells what became of it, also when that dies.

This runs in a process of Ray or a thread of the driver, and imports nothing heavy. When the worker dies, the pipe to
its process is closed, and the process ends itself (`diffc.sweep.child`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

_POLL = 0.2
_ENDING = 10.0
"""Seconds that processes get to be gone after they were killed, so that none writes where the next try does."""
COMMAND = ("-m", "diffc.sweep.child")
"""The process that does a job, after Python's own name."""
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")
"""Signals of a crash, which another try would meet again."""


@dataclass(frozen=True)
class Attempt:
    """What became of a job: the lines of rows that its process wrote, and how it died, empty when it did not.

    `crashed`: it died of its own work, and not by somebody else's hand.
    """

    rows: tuple[str, ...]
    died: str
    crashed: bool
    worker: str


def attempt(payload: bytes, threads: int, logs: str, stopped: Callable[[], bool] = lambda: False) -> Attempt:
    """Run the pickled job `payload` in a process of its own, with a log in the folder `logs` where there is one."""
    with tempfile.TemporaryDirectory(prefix="diffc-sweep-") as own:
        rows, log = Path(own) / "rows.jsonl", Path(own) / "log.txt"
        kept = bool(logs) and Path(logs).is_dir()
        if kept:
            log = Path(logs) / f"{platform.node()}-{os.getpid()}-{time.time_ns()}.txt"
        with log.open("wb") as file, _started(rows, file, threads) as process:
            _give(process, payload)
            code = _wait(process, stopped)
        lines = rows.read_text(encoding="utf-8").splitlines(keepends=True) if rows.is_file() else []
        whole = tuple(line for line in lines if line.endswith("\n"))
        name, crashed = _death(code)
        died = "" if code == 0 else f"{name}{_last_words(log)}"
        if kept and not died:
            log.unlink()
        return Attempt(whole, died, crashed, f"{platform.node()}:{process.pid}")


@contextlib.contextmanager
def _started(rows: Path, log: IO[bytes], threads: int) -> Iterator[subprocess.Popen[bytes]]:
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["PYTHONFAULTHANDLER"] = "1"
    command = [sys.executable, "-P", *COMMAND, str(rows)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()
        process.wait()


def _give(process: subprocess.Popen[bytes], payload: bytes) -> None:
    """Send the job; the pipe stays open, since its end tells the process that this worker is gone."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # a process that died at once: its exit code says why
        process.stdin.write(struct.pack(">Q", len(payload)) + payload)
        process.stdin.flush()


def _wait(process: subprocess.Popen[bytes], stopped: Callable[[], bool]) -> int:
    """The exit code. What the process had started, such as builders, is ended with it."""
    known: dict[int, psutil.Process] = {}
    while process.poll() is None:
        ending = stopped()
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                known.setdefault(child.pid, child)
        if ending:
            process.kill()
        time.sleep(_POLL)
    for child in known.values():
        with contextlib.suppress(psutil.Error):
            if child.is_running():  # the same process, not a later one of its number
                child.kill()
    psutil.wait_procs(known.values(), timeout=_ENDING)
    return process.returncode


def _death(code: int) -> tuple[str, bool]:
    """How a process with this exit code ended, and whether by a crash of its own."""
    if code >= 0:
        return f"exit code {code}", False
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return name, name in CRASHES
    return f"signal {-code}", False


def _last_words(log: Path) -> str:
    """The last line that the process wrote to its log."""
    with contextlib.suppress(OSError):
        lines = [line.strip() for line in log.read_bytes()[-4000:].decode("utf-8", "replace").splitlines()]
        said = next((line for line in reversed(lines) if line), "")
        return f", after: {said[:300]}" if said else ""
    return ""
