"""Stages drawn with rich: a bar with elapsed and remaining time on a terminal and in Jupyter, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from diffc.progress import Logged, Reporter, Update
from diffc.terminal_text import Screen, line, styled


class ProgressBar(Logged):
    """Draws every stage on standard error, or on `console`, and logs it.

    A terminal shows a bar while a stage runs, and a line with its time when it is done. Where there is no terminal
    (a file, a pipe, CI), there is a line at its start and one at its end.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Screen(stderr=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Draw the stage."""
        started = time.perf_counter()
        with super().stage(title), self._drawn(line(title)) as update:
            yield update
        self.console.print(styled(f"  {title}", (f" ({duration(time.perf_counter() - started)})", "dim")))

    @contextmanager
    def _drawn(self, title: str) -> Iterator[Update]:
        if not (self.console.is_terminal or self.console.is_jupyter):
            self.console.print(styled(f"  {title} ..."))
            yield lambda done, total: None
            return
        name = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        columns = (name, BarColumn(20), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"))
        with Progress(
            *columns, TimeRemainingColumn(), console=self.console, transient=True, expand=True
        ) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Print the line."""
        super().note(text)
        self.console.print(styled(f"    {text}"), soft_wrap=True)


def default_reporter() -> Reporter:
    """The reporter of a call from Python: a progress bar on a terminal and in Jupyter, else log records alone."""
    bar = ProgressBar()
    return bar if sys.stderr.isatty() or bar.console.is_jupyter else Logged()


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
