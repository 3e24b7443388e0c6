"""What running work tells: stages, progress and notes. What works knows the protocol; a reporter shows it.

Silent         shows nothing
Logged         logs stages and notes with the logger `diffc.progress`
ProgressBar    draws them too (`diffc.progress_bar`): the default from Python, Jupyter and the command line
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

LOG = logging.getLogger("diffc.progress")
Update = Callable[[int, int], None]
"""Called with the amount done and the amount in all."""
_TICK = 0.25
"""Seconds between two steps of a progress that is estimated."""


class Reporter(Protocol):
    """Receives the progress of a command."""

    def stage(self, title: str) -> AbstractContextManager[Update]:
        """A named piece of work with its progress, open while it runs. Stages do not contain stages."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


class Silent:
    """Shows nothing."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Draw nothing."""
        del title
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """Print nothing."""


class Logged:
    """Logs stages, with their seconds, and notes."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Log the start and the end."""
        LOG.info("%s ...", title)
        started = time.perf_counter()
        try:
            yield lambda done, total: None
        except BaseException as error:
            LOG.info("%s: stopped by %s (%.1f s)", title, type(error).__name__, time.perf_counter() - started)
            error.add_note(f"{_DOING}{title}")
            raise
        LOG.info("%s (%.1f s)", title, time.perf_counter() - started)

    def note(self, text: str) -> None:
        """Log the line."""
        LOG.info("%s", text)


_DOING = "while diffc was to "


def stage_of(error: BaseException) -> str:
    """The title of the stage in which an error came up; empty outside of one."""
    notes = getattr(error, "__notes__", ())
    return next((n.removeprefix(_DOING) for n in notes if isinstance(n, str) and n.startswith(_DOING)), "")


@dataclass(frozen=True)
class Part:
    """A reporter for part `number` of `count` parts of a command: the titles of its stages say so."""

    ui: Reporter
    number: int
    count: int

    def stage(self, title: str) -> AbstractContextManager[Update]:
        """A stage called "[2/6] title"."""
        return self.ui.stage(f"[{self.number}/{self.count}] {title}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self.ui.note(text)


def untitled(title: str) -> str:
    """The title of a stage without the number of its part."""
    return re.sub(r"^\[\d+/\d+\] ", "", title)


@dataclass(frozen=True)
class Parts:
    """The parts of a command in order, and the reporter that each of them is given."""

    ui: Reporter
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Reporter:
        """The reporter of a part; without a number for one that is left out this time."""
        if name not in self.names:
            return self.ui
        return Part(self.ui, self.names.index(name) + 1, len(self.names))


@contextmanager
def estimated(update: Update, seconds: float, *, start: float = 0.0, end: float = 1.0) -> Iterator[None]:
    """Progress for work that tells none: from the share `start` to `end` in about `seconds`.

    Work that takes longer slows the progress down more and more, so that it moves and never claims to be done.
    """
    begun, stop = time.perf_counter(), threading.Event()

    def tick() -> None:
        while not stop.wait(_TICK):
            share = start + (end - start) * _share((time.perf_counter() - begun) / max(seconds, _TICK))
            update(int(1000 * share), 1000)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        stop.set()
        ticker.join()
    update(int(1000 * end), 1000)


def _share(time_used: float) -> float:
    """The share of the work that is done after `time_used` of the expected time (1.0: all of it)."""
    linear = 0.8
    return (
        time_used if time_used < linear else 1 - (1 - linear) * math.exp((linear - time_used) / (1 - linear))
    )
