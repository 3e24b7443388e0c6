"""The progress of a compile on a terminal, drawn with rich."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from diffc.progress import Update
from diffc.terminal_text import Screen, line, styled


class Terminal:
    """Draws stages with rich: a bar while they run, one line when they are done."""

    def __init__(self) -> None:
        self.console = Screen(stderr=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A bar while the stage runs and a line with its time afterwards."""
        title = line(title)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
        )
        # Into a pipe or a file, a bar would leave empty lines.
        hidden, started = not self.console.is_terminal, time.perf_counter()
        with Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=hidden
        ) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        self.console.print(styled(f"  {title} ", (f"({time.perf_counter() - started:.1f} s)", "dim")))

    def note(self, text: str) -> None:
        """Print the line."""
        self.console.print(styled(f"    {text}"))
