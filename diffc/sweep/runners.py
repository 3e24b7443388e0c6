"""Who does the jobs of a sweep: workers of Ray, or processes of this machine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from diffc.sweep.worker import Attempt, attempt


class Runner(Protocol):
    """Takes jobs, starts each when there is a core and its memory, and tells what became of it."""

    largest: int
    """Bytes that one job may hold at most: the memory of the largest machine."""

    def submit(self, name: str, payload: bytes, needs: int) -> None:
        """Take a pickled job called `name`, which needs that many bytes."""
        ...

    def finished(self, timeout: float) -> list[tuple[str, Attempt]]:
        """The jobs that have ended since the last call, by name; waits `timeout` seconds for the first."""
        ...

    def close(self) -> None:
        """End what is running."""
        ...


class Processes:
    """`workers` jobs at a time on this machine, as far as `memory` bytes take them."""

    def __init__(self, workers: int, memory: int, threads: int, logs: str) -> None:
        self.largest, self._threads, self._logs = memory, threads, logs
        self._free, self._changed, self._stopped = memory, threading.Condition(), False
        self._pool = ThreadPoolExecutor(workers)
        self._names: dict[Future[Attempt], str] = {}

    def submit(self, name: str, payload: bytes, needs: int) -> None:
        """Take a job."""
        self._names[self._pool.submit(self._run, payload, min(needs, self.largest))] = name

    def _run(self, payload: bytes, needs: int) -> Attempt:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= needs or self._stopped)
            self._free -= needs
        try:
            return attempt(payload, self._threads, self._logs, lambda: self._stopped)
        finally:
            with self._changed:
                self._free += needs
                self._changed.notify_all()

    def finished(self, timeout: float) -> list[tuple[str, Attempt]]:
        """The jobs that have ended."""
        if not self._names:
            time.sleep(timeout)
            return []
        done, _ = wait(self._names, timeout, FIRST_COMPLETED)
        return [(self._names.pop(future), _outcome(future)) for future in done]

    def close(self) -> None:
        """End what is running."""
        self._stopped = True
        with self._changed:
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)


def _outcome(future: Future[Attempt]) -> Attempt:
    """What became of a job; a machine that could not even start its process is an Attempt that says so."""
    try:
        return future.result()
    except OSError as error:
        return lost(f"{type(error).__name__}: {error}")


def lost(reason: Any) -> Attempt:
    """The end of a job whose worker is gone."""
    return Attempt((), str(reason), crashed=False, worker="")
