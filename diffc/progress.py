"""What a running compile tells: stages, progress and notes. The spine knows the protocol, the CLI draws it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Update = Callable[[int, int], None]
"""Called with the amount done and the amount in all."""


class Reporter(Protocol):
    """Receives the progress of a compile."""

    def stage(self, title: str) -> AbstractContextManager[Update]:
        """A named piece of work with a progress bar; closing it ends the bar."""
        ...

    def note(self, text: str) -> None:
        """A line that stays."""
        ...


class Silent:
    """Says nothing: for use from Python."""

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """Nothing is drawn."""
        del title
        yield lambda done, total: None

    def note(self, text: str) -> None:
        """Nothing is printed."""


class Terminal:
    """Draws stages with rich: a bar while they run, one line when they are done."""

    def __init__(self) -> None:
        from diffc.terminal_text import Screen

        self.console = Screen(stderr=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A bar while the stage runs and a line with its time afterwards."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from diffc.terminal_text import line, styled

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
        from diffc.terminal_text import styled

        self.console.print(styled(f"    {text}"))
