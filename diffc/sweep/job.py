"""A piece of work for one worker: cells that share all but their engines, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffc.compile.request import CompileRequest
from diffc.sweep.cells import Cell
from diffc.sweep.request import Steps
from diffc.sweep.rows import Row


@dataclass(frozen=True)
class Task:
    """A cell to compile; with `there`, whose artifact is finished and which only lacks steps after it.

    `attempt` counts from 1. `dtype`: the compute type. `before`: the row of the finished artifact.
    """

    cell: Cell
    request: CompileRequest
    dtype: str
    attempt: int
    there: bool = False
    before: Row | None = None


@dataclass(frozen=True)
class Job:
    """What a worker is given. `needs`: bytes of memory. `calibration`: the key of what the cells calibrate with.

    `folder`: the sweep's own, which has the file `token`; `artifacts` and `calibrations`: addresses of stores, the
    first empty where artifacts go to `folder`. `code`: what the worker's own code must be. `source`: the cell that has
    made the calibration, empty where it is not made yet.
    """

    tasks: tuple[Task, ...]
    needs: int
    graph: str
    calibration: str
    folder: Path
    token: str
    artifacts: str
    calibrations: str
    steps: Steps
    code: str
    source: str = ""

    @property
    def name(self) -> str:
        """The name of its first cell."""
        return self.tasks[0].cell.name
