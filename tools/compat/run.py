"""Where the probes of `tools.compat` run: a child process per runtime, started again whenever one crashes.

The builders are native code: a probe may end the process (Attention with one tensor as q, k and v did). The child
answers one probe after the other; when it dies, the probe in hand is recorded as a crash and the rest goes on.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from diffc.backends.sm import KNOWN_SMS
from diffc.backends.target import TARGETS, Target
from diffc.backends.tensorrt.build import has_device
from tools.compat.backends import Said, probe_engine, probe_session

TIMEOUT = 120.0
"""Seconds after which a probe counts as hanging; the slowest takes 3."""


@dataclass(frozen=True)
class Runtime:
    """A compiler or runtime that is installed here: its target, its version, the columns of its table."""

    target: Target
    version: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """One probe as the child needs it: the model's bytes, the sizes of dynamic inputs, elements of the weight.

    `ranges` maps an input with dynamic dims to its shapes: "min", "opt", "max". `weights` is 0 where the size of
    the engine is of no interest.
    """

    name: str
    model: bytes
    ranges: Mapping[str, Mapping[str, Sequence[int]]]
    weights: int


def installed() -> list[Runtime]:
    """The compilers and runtimes that can be probed on this machine, a target for each module."""
    found = []
    for target in {t.module: t for t in reversed(TARGETS.values())}.values():
        here = importlib.util.find_spec(target.module) is not None
        if here and (not target.is_engine or target.ahead_of_time or has_device()):
            module = importlib.import_module(target.module)
            found.append(Runtime(target, str(module.__version__), tuple(_columns(target))))
    return found[::-1]


def _columns(target: Target) -> Iterator[str]:
    if target.is_engine:
        yield from [f"sm{sm}" for sm in KNOWN_SMS] if target.ahead_of_time else ["gpu"]
        return
    import onnxruntime

    for provider in onnxruntime.get_available_providers():
        if provider != "AzureExecutionProvider":  # runs elsewhere
            short = provider.removesuffix("ExecutionProvider").lower()
            yield from (short, f"{short}-exact", f"{short}-plain")


def run_all(runtime: Runtime, jobs: Sequence[Job]) -> Iterator[tuple[Job, dict[str, str]]]:
    """Each job with what was said about it, in order: a verdict per column, and figures."""
    left = list(jobs)
    while left:
        with _child(runtime) as (process, connection):
            alive = True
            while left and alive:
                said: dict[str, str] = {}
                alive = _ask(connection, left[0], said)
                if not alive:
                    process.join(1)
                    end = _death(process.exitcode)
                    said = dict.fromkeys(runtime.columns, end) | said
                yield left.pop(0), said


@contextlib.contextmanager
def _child(runtime: Runtime) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, runtime), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _ask(connection: Connection, job: Job, said: dict[str, str]) -> bool:
    """Fill `said` with what the child says about the job; whether it lived to the end of it."""
    try:
        connection.send(job)
        while connection.poll(TIMEOUT):
            item = connection.recv()
            if item is None:
                return True
            said.update([item])
    except (EOFError, OSError):
        pass
    return False


def _death(exitcode: int | None) -> str:
    if exitcode is None:
        return f"crash: no answer in {TIMEOUT:.0f} s"
    known = {s.value: s.name for s in signal.Signals}
    return f"crash: {known.get(-exitcode, f'exit code {exitcode}')}"


def _serve(connection: Connection, runtime: Runtime) -> None:
    """The child: answer jobs until there are no more. What native code prints goes nowhere."""
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    with contextlib.suppress(EOFError):
        while True:
            for item in _answer(runtime, connection.recv()):
                connection.send(item)
            connection.send(None)


def _answer(runtime: Runtime, job: Job) -> Iterator[Said]:
    if runtime.target.is_engine:
        return probe_engine(runtime.target.module, runtime.columns, job.model, job.ranges, job.weights)
    return probe_session(runtime.columns, job.model, job.ranges)
