"""Runs a piece of work in a copy of this process, and ends or troubles it at its n-th step on the disk.

A step is what changes a folder: opening a file for writing, making, renaming and removing. Python tells of each before
it happens (`sys.addaudithook`), so that every one of them can be the last, or the one that fails.
"""

from __future__ import annotations

import contextlib
import errno
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
GROWS = {"os.mkdir", "os.link", "os.symlink"}
"""What a full disk does not let happen, beside writing."""

Work = Callable[[], Any]


def killed_at(work: Work, number: int) -> bool:
    """Kill `work` before its step `number`, counted from 1; False when it came to its end before."""

    def end(_: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    code, _, _ = _apart(work, number, end, once=True)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def failed_at(work: Work, number: int, error: int) -> tuple[bool, Any, str]:
    """Let the system say `error` to step `number` of `work` and to all like it that follow.

    Whether that step was reached, what `work` returns, and what it says on stderr. A full disk lets files be removed
    and renamed.
    """

    def fail(event: str) -> None:
        if event in GROWS or event == "open" or error not in FULL:
            raise OSError(error, os.strerror(error))

    code, (reached, answer), said = _apart(work, number, fail, once=False)
    assert code == 0, said
    return reached, answer, said


FULL = (errno.ENOSPC, errno.EDQUOT)


def _apart(
    work: Work, number: int, act: Callable[[str], None], *, once: bool
) -> tuple[int | None, tuple[bool, Any], str]:
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, work, number, act, once))
    process.start()
    theirs.close()
    try:
        answer, said = ours.recv()
    except EOFError:
        answer, said = (False, None), ""
    process.join(60)
    return process.exitcode, answer, said


def _run(pipe: Any, work: Work, number: int, act: Callable[[str], None], once: bool) -> None:
    steps = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event in CHANGES or (event == "open" and _writes(arguments)):
            steps += 1
            if steps == number or (steps > number and not once):
                act(event)

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        sys.addaudithook(hook)
        answer = work()
    reached, number = steps >= number, 1 << 62
    pipe.send(((reached, answer), said.getvalue()))


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an event "open" (path, mode, flags) makes or changes a file."""
    path, _, flags = arguments
    named = (
        isinstance(path, str | bytes | os.PathLike) and os.fspath(path) not in _DEVICES
    )  # else it is open already
    return named and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


_DEVICES = ("/dev/null", b"/dev/null")
