"""Foreign code on a stranger's file, in a process of its own that can be ended: by time, by memory, by Ctrl-C.

Native code keeps Python's lock and hears no Ctrl-C while it works. A file of a kilobyte can keep it busy for ever, let
it ask for terabytes, or crash it. In a process apart each of these is one error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from diffc.errors import DiffcError

FORKS = sys.platform == "linux"
"""Whether a process apart starts with all that this one has in memory; else it starts anew, which takes seconds."""
_IMPORTS = 20.0
"""Seconds that a process which starts anew may take for its imports."""
_OPEN = Path("/proc/self/fd")
"""Where Linux lists the numbers of a process's open files."""
_POLL = 0.02
_STUCK = 20.0
"""Seconds without work after which a process is taken to wait for something that never comes."""


class Ended(DiffcError):
    """The process was ended, or ended itself, before it had an answer; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def run_apart(
    function: Callable[..., Any], *arguments: Any, seconds: float, memory: int, forks: bool = FORKS
) -> Any:
    """`function(*arguments)` in a process apart; what it raises is raised here.

    `forks`: whether the process begins as a copy of this one. It may use `seconds` of one core and `memory` bytes
    beyond what it starts with. Raises Ended when it needs more, and when it crashes. Function, arguments and result are
    pickled.
    """
    seconds += 0 if forks else _IMPORTS
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, memory, seconds, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = _wait(ours, psutil.Process(process.pid), seconds, memory)
    finally:
        process.kill()
        process.join()
        ours.close()
    if answer is None:
        raise Ended(f"it crashed ({_died(process.exitcode)})")
    good, value = answer
    if good:
        return value
    raise Ended("it needs too much memory") if isinstance(value, MemoryError) else value


def _wait(ours: Connection, process: psutil.Process, seconds: float, memory: int) -> tuple[bool, Any] | None:
    """The answer of the process; None when it ends without one. Raises Ended when it takes too much."""
    begun = moved = time.monotonic()
    start, last = 0, 0.0
    while True:
        if ours.poll(_POLL):
            try:
                return pickle.loads(ours.recv_bytes())  # type: ignore[no-any-return]
            except (EOFError, OSError):
                return None
        with contextlib.suppress(psutil.Error):
            used, held = sum(process.cpu_times()[:2]), process.memory_info().rss
            start = start or held
            moved, last = (time.monotonic(), used) if used > last else (moved, last)
            if used > seconds:
                raise Ended(f"it did not come to an end within {seconds:.0f} s")
            if held - start > memory:
                raise Ended(f"it needs more than {memory >> 20} MB of memory")
        if time.monotonic() - moved > _STUCK and time.monotonic() - begun > 2 * seconds:
            raise Ended(f"it waits for something that does not come, for {_STUCK:.0f} s")


def _work(
    theirs: Connection, memory: int, seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """In the process: run, and send (True, result) or (False, error)."""
    _alone(theirs.fileno())
    faulthandler.disable()  # a crash is told by the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, and ends this
    _limit(memory, seconds)
    try:
        answer = (True, function(*arguments))
    except BaseException as error:
        answer = (False, error)
    theirs.send_bytes(_packed(answer))
    theirs.close()


def _alone(pipe: int) -> None:
    """Hold nothing of the parent's open but `pipe` and what it prints to, and end when the parent does.

    A file that a copy of a process inherits stays locked while either of them lives. Its numbers are given something
    else: whoever closes them later must not close a file that came to have one of them.
    """
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if not _OPEN.is_dir():  # no copy, then, which has only what it was given
        return
    kept, nothing = {0, 1, 2, pipe, parent.sentinel}, os.open(os.devnull, os.O_RDWR)
    for number in {int(entry.name) for entry in _OPEN.iterdir()} - kept:
        with contextlib.suppress(OSError):  # that of the list itself is closed by now
            os.dup2(nothing, number, inheritable=False)


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _packed(answer: tuple[bool, Any]) -> bytes:
    try:
        data = pickle.dumps(answer)
        pickle.loads(data)  # an exception with arguments of its own cannot be made again
    except Exception:
        return pickle.dumps((False, DiffcError(f"{type(answer[1]).__name__}: {answer[1]}")))
    return data


def _limit(memory: int, seconds: float) -> None:
    """Let the system refuse what goes beyond `memory`, where it can: looking at it comes too late for one request."""
    if sys.platform == "linux":
        process = psutil.Process()
        limit = process.memory_info().vms + 2 * memory + (1 << 29)  # arenas and stacks are asked for unused
        _, hard = process.rlimit(psutil.RLIMIT_AS)
        process.rlimit(psutil.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
        process.rlimit(psutil.RLIMIT_CORE, (0, 0))
        last = int(2 * seconds) + 10  # for a process whose parent was killed
        process.rlimit(psutil.RLIMIT_CPU, (last, last))


def _died(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
