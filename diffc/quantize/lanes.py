"""Functions that run in turns: one at a time, each in a thread, until it passes the turn on.

So several batches go through a backbone layer by layer, and a layer's weight comes once for all of them. What each of
them computes is what it computes alone: kernels and shapes are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_POLL = 0.1
"""Seconds after which who waits for the lanes looks for Ctrl-C, which a waiting thread does not hear on Windows."""


class Stopped(BaseException):
    """Another lane has failed; no error, so that no library takes it for one of the lane's own."""


@dataclass(eq=False)
class _Lane:
    function: Callable[[], None]
    turn: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.turn.acquire()  # released when it is its turn


class Lanes:
    """Runs functions in turns."""

    def __init__(self, functions: Sequence[Callable[[], None]]) -> None:
        self._lanes = [_Lane(function) for function in functions]
        self._at = 0
        self._error: BaseException | None = None
        self._over = threading.Event()

    def run(self) -> None:
        """Run all functions to their ends. Raises the first error of any; the others are stopped then."""
        threads = [threading.Thread(target=self._work, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in threads:
            thread.start()
        self._lanes[0].turn.release()
        try:
            while not self._over.wait(_POLL):
                pass
        except BaseException as error:  # Ctrl-C
            self._error = self._error or error
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def pass_on(self) -> None:
        """Let the next function go on, and wait for the next turn. Raises Stopped when another has failed."""
        lane = self._lanes[self._at]
        self._stop_after_error()
        if len(self._lanes) > 1:
            self._next(self._at + 1)
            lane.turn.acquire()
            self._stop_after_error()

    def _next(self, at: int) -> None:
        self._at = at % len(self._lanes)
        self._lanes[self._at].turn.release()

    def _stop_after_error(self) -> None:
        if self._error is not None:
            raise Stopped

    def _work(self, lane: _Lane) -> None:
        lane.turn.acquire()
        try:
            self._stop_after_error()
            lane.function()
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        at = self._lanes.index(lane)
        del self._lanes[at]
        if self._lanes:
            self._next(at)
        else:
            self._over.set()
