"""A sweep as it goes on: a table that is drawn anew on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.live import Live
from rich.table import Table

from diffc.progress_bar import duration
from diffc.sweep.book import Book
from diffc.sweep.job import Job
from diffc.sweep.jobs import Standing
from diffc.sweep.rows import DONE, FAILED, LOST, REFUSED, Row, Status
from diffc.terminal_text import Screen, cell, styled

STATUSES: tuple[Status, ...] = (DONE, REFUSED, FAILED, LOST)
STYLES: Mapping[str, str] = {DONE: "green", REFUSED: "yellow", FAILED: "red", LOST: "red"}
_SHOWN = 12
"""Cells that the table of a terminal shows, those that run first."""


class Progress:
    """Shows a sweep on `console`."""

    def __init__(self, console: Screen | None = None, *, quiet: bool = False) -> None:
        self.console = console or Screen(stderr=True)
        self._quiet, self._begun = quiet, time.perf_counter()
        self._rows: dict[str, Row] = {}
        self._running: dict[str, float] = {}
        self._cells = 0
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        """Draw until the block ends."""
        if self.console.is_terminal and not self._quiet:
            self._live = Live(self.table(), console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the table away."""
        if self._live is not None:
            self._live.stop()

    def known(self, cells: Sequence[Standing | Row], workers: int) -> None:
        """Take note of every cell."""
        self._cells = len(cells)
        for each in cells:
            row = each if isinstance(each, Row) else each.row if each.done else None
            if row is not None:
                self._rows[row.cell] = row
        left = len(cells) - len(self._rows)
        self.say(f"cells: {len(cells)}, left to do: {left}, workers: {workers}")

    def begun(self, job: Job) -> None:
        """Say which cells a worker gets."""
        for task in job.tasks:
            self._running[task.cell.name] = time.perf_counter()
        self.say(f"given to the workers: {', '.join(task.cell.name for task in job.tasks)}")

    def row(self, row: Row) -> None:
        """Say what became of a cell."""
        self._rows[row.cell] = row
        self._running.pop(row.cell, None)
        took = "" if row.seconds is None else f" ({duration(row.seconds)})"
        self.say(f"{row.cell}: {row.status}{took}", row.message.partition("\n")[0])

    def tick(self) -> None:
        """Draw the times anew."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)

    def say(self, text: str, more: str = "") -> None:
        """Print a line that stays."""
        if not self._quiet:
            self.console.print(styled(f"  {text}", f": {more}" if more else ""), soft_wrap=True)

    def table(self) -> Table:
        """Counts, the cells that are with the workers, and the last that ended."""
        counts = Counter(row.status for name, row in self._rows.items() if name not in self._running)
        told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
        title = f"{self._cells} cells: {told or 'none done'}, {len(self._running)} with the workers"
        table = Table("cell", "state", "time", title=cell(title), box=box.SIMPLE_HEAD, title_justify="left")
        now = time.perf_counter()
        for name, begun in list(self._running.items())[:_SHOWN]:
            table.add_row(cell(name), cell("with the workers"), cell(duration(now - begun)))
        ended = [row for name, row in self._rows.items() if name not in self._running]
        for row in ended[-max(1, _SHOWN - len(self._running)) :]:
            took = "-" if row.seconds is None else duration(row.seconds)
            table.add_row(cell(row.cell), cell(row.status, STYLES[row.status]), cell(took))
        return table


def cells_table(rows: Sequence[Row]) -> Table:
    """Every cell with what became of it."""
    table = Table(
        "cell", "state", "time", "memory", "weights", "engines", "error", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for row in rows:
        table.add_row(cell(row.cell), cell(row.status, STYLES[row.status]), *map(cell, _figures(row)))
    return table


def _figures(row: Row) -> list[str]:
    def megabytes(value: int | None) -> str:
        return "-" if not value else f"{value / 1e6:.1f} MB"

    return [
        "-" if row.seconds is None else duration(row.seconds),
        megabytes(row.peak_memory),
        megabytes(row.sizes.get("weights")),
        megabytes(row.sizes.get("engines")),
        f"{max(row.errors.values()):.1e}" if row.errors else "-",
    ]


def planned_table(stands: Sequence[Standing | Row], book: Book) -> Table:
    """Every cell before any work: what it needs, how long such a one took, and why it cannot be."""
    table = Table("cell", "state", "memory", "time", "shares", box=box.SIMPLE_HEAD, pad_edge=False)
    graphs: dict[str, str] = {}
    calibrations: dict[str, str] = {}
    for each in stands:
        if isinstance(each, Row):
            table.add_row(cell(each.cell), cell(each.status, STYLES[each.status]), "-", "-", "-")
            continue
        name = each.ready.cell.name
        state = (
            "done" if each.done else f"steps left: {', '.join(each.steps_left)}" if each.row else "to compile"
        )
        graph = graphs.setdefault(each.ready.graph, name)
        maker = calibrations.setdefault(each.ready.calibration or name, name)
        shares = f"graph of {graph}" if graph != name else f"calibration of {maker}" if maker != name else "-"
        seconds = book.seconds_of(each.ready.cell)
        table.add_row(*map(cell, (name, state, f"{each.ready.needs / 1e9:.1f} GB", _time(seconds), shares)))
    return table


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"about {duration(seconds)}"


def described(stands: Sequence[Standing | Row], book: Book) -> list[dict[str, Any]]:
    """What --json tells of a sweep before any work."""
    found: list[dict[str, Any]] = []
    for each in stands:
        if isinstance(each, Row):
            found.append({"cell": each.cell, "status": each.status, "message": each.message})
        else:
            ready = each.ready
            status = DONE if each.done else "to do"
            seconds = book.seconds_of(ready.cell)
            found.append(
                {"cell": ready.cell.name, "status": status, "memory": ready.needs, "seconds": seconds}
            )
    return found
