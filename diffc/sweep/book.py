"""The folder of a sweep: its rows as they come in, and the summary after each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from diffc.artifact.describe import versions
from diffc.sweep.cells import Cell
from diffc.sweep.request import SweepRequest
from diffc.sweep.rows import (
    DONE,
    FAILED,
    LINES,
    LOST,
    REFUSED,
    SCHEMA,
    SUMMARY,
    Row,
    Summary,
    is_sweep,
    last_rows,
    line_of,
    now,
    read_rows,
    read_summary,
)
from diffc.version import VERSION
from passes.files.atomic import check_own, write_text


class Book:
    """The rows of a sweep in its folder. Nothing is written before the first row or summary."""

    def __init__(self, request: SweepRequest, cells: Sequence[Cell]) -> None:
        """Open the folder. Raises DiffcError or PassError where its files are damaged or not ours."""
        self._request, self._cells = request, cells
        self._path = request.folder / LINES
        check_own(self._path)
        self.rows = read_rows(request.folder)
        earlier = read_summary(request.folder) if is_sweep(request.folder) else None
        self._started = now() if earlier is None else earlier.started
        self._before = 0.0 if earlier is None else earlier.seconds
        self._runs = 1 if earlier is None else earlier.runs + 1
        self.workers = 0

    @property
    def last(self) -> dict[str, Row]:
        """The last row of each cell."""
        return last_rows(self.rows)

    def seconds_of(self, cell: Cell) -> float | None:
        """The seconds that such a cell has taken: itself, or another one of its model and format; None if unknown."""
        done = [row for row in self.rows if row.status == DONE and row.seconds and not row.graph]
        near = [row for row in done if (row.model, row.format) == (cell.model, cell.format)]
        own = [row for row in near if row.cell == cell.name]
        found = own or near or [row for row in done if row.model == cell.model]
        return max((row.seconds or 0.0 for row in found), default=None)

    def add(self, row: Row, seconds: float) -> None:
        """Write a row, and the summary with it. `seconds`: those of this run so far."""
        self.rows.append(row)
        with self._path.open("ab") as file:
            file.write(line_of(row).encode())
            file.flush()
            os.fsync(file.fileno())
        self.write("running", seconds)

    def begin(self) -> None:
        """Make the folder ready; a last line that was cut off goes."""
        self._request.folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            content = self._path.read_bytes()
            if content and not content.endswith(b"\n"):
                os.truncate(self._path, content.rfind(b"\n") + 1)

    def write(self, state: Literal["running", "finished", "stopped"], seconds: float) -> Summary:
        """Write the summary as it is now."""
        summary = self.summary(state, seconds)
        write_text(
            self._request.folder / SUMMARY, msgspec.json.format(msgspec.json.encode(summary)).decode() + "\n"
        )
        return summary

    def summary(self, state: Literal["running", "finished", "stopped"], seconds: float) -> Summary:
        """The summary as it is now."""
        last = self.last
        rows = [last[cell.name] for cell in self._cells if cell.name in last]
        names = {cell.name for cell in self._cells}
        statuses = Counter(row.status for row in rows)
        attempts = sum(row.attempt > 0 for row in self.rows if row.cell in names)
        counts = {status: statuses[status] for status in (DONE, REFUSED, FAILED, LOST)}
        return Summary(
            SCHEMA,
            VERSION,
            versions(),
            list(self._request.command),
            state,
            self._started,
            round(self._before + seconds, 3),
            self._runs,
            self.workers,
            self._request.address,
            self._request.axes.described(),
            {**counts, "cells": len(self._cells), "attempts": attempts},
            rows,
        )
