"""Lets the disk work while a file is still written, so that the end does not wait for all of it at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

EVERY = 1 << 28
"""Bytes that a file grows by before it is flushed again."""

_flush: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # Windows and macOS have fsync alone


class Flusher:
    """Flushes an open file in a thread of its own, one flush at a time, while others go on writing to it.

    A system may begin to write a file to its disk only when a tenth of the memory waits for that, which is more than
    the whole file where there is much memory. An error of a flush is told to one caller only, so it is kept for
    whoever comes next.
    """

    def __init__(self, descriptor: int):
        self._descriptor, self._flushed = descriptor, 0
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()  # the descriptor is closed after this

    def grown(self, length: int) -> None:
        """Note the file's length; begin a flush where it grew enough and none is under way. Waits for nothing."""
        if self._running is not None:
            if not self._running.done():
                return
            self._running.result()
        if length - self._flushed >= EVERY:
            self._flushed = length
            self._running = self._pool.submit(_flush, self._descriptor)

    def finish(self) -> None:
        """Wait until all of the file is on the disk. Raises the OSError of this flush or of one before."""
        if self._running is not None:
            self._running.result()
        os.fsync(self._descriptor)
