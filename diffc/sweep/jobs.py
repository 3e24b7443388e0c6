"""Which cells are left, which of them are one job, and which job waits for the calibration of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from diffc.artifact.folder import MANIFEST
from diffc.artifact.measured import errors_of, sizes_of
from diffc.compile.request import code_of_diffc
from diffc.errors import DiffcError
from diffc.sweep.book import Book
from diffc.sweep.job import Job, Task
from diffc.sweep.prepare import Ready, finished, refusal, row_of
from diffc.sweep.request import SweepRequest
from diffc.sweep.rows import DONE, FAILED, LOST, Row, Step
from diffc.sweep.store import SharedCalibrations, Store
from diffc.sweep.worker import Attempt
from passes.base import PassError


@dataclass(frozen=True)
class Standing:
    """A cell that can be compiled, and what is there of it: `row` where its artifact is finished.

    `steps_left`: those that are asked for and were not done with it.
    """

    ready: Ready
    row: Row | None
    steps_left: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.row is not None and not self.steps_left


def standing(
    request: SweepRequest, found: Sequence[Ready | Row], book: Book, store: Store | None
) -> list[Standing | Row]:
    """Where every cell stands; the row of a cell that cannot be compiled."""
    last = book.last
    return [each if isinstance(each, Row) else _stand(request, each, last, store) for each in found]


def _stand(request: SweepRequest, ready: Ready, last: dict[str, Row], store: Store | None) -> Standing | Row:
    try:
        manifest = finished(ready, store)
    except (DiffcError, PassError) as error:
        return refusal(ready.cell, error)
    if manifest is None:
        return Standing(ready, None)
    row = last.get(ready.cell.name)
    if row is None or row.status != DONE:  # its worker died after it had finished, or the rows are gone
        address = str(ready.request.output) if store is None else store.address(ready.cell.name)
        row = row_of(
            ready.cell,
            ready.dtype,
            status=DONE,
            attempt=0 if row is None else row.attempt,
            artifact=address,
            sizes=sizes_of(manifest),
            errors=errors_of(manifest),
        )
    left = tuple(name for name in request.steps.names if not _is_done(row.steps.get(name)))
    return Standing(ready, row, left)


def _is_done(step: Step | None) -> bool:
    return step is not None and step.status == DONE


@dataclass
class Board:
    """The jobs that wait, run and were lost; cells leave it with a row that is final for this run."""

    request: SweepRequest
    book: Book
    store: Store | None
    calibrations: SharedCalibrations
    token: str
    waiting: list[Job] = field(default_factory=list)
    running: dict[str, Job] = field(default_factory=dict)
    _ready: dict[str, Ready] = field(default_factory=dict)
    _first: dict[str, int] = field(default_factory=dict)
    _makers: dict[str, str] = field(default_factory=dict)

    def fill(self, cells: Sequence[Standing]) -> None:
        """Make jobs of the cells that are left: those of one graph are one job."""
        groups: dict[str, list[Standing]] = {}
        counted = [row.cell for row in self.book.rows if row.attempt]
        for each in cells:
            name = each.ready.cell.name
            self._ready[name], self._first[name] = each.ready, counted.count(name) + 1
            if each.done:
                self._note_maker(each)
                continue
            # Steps alone need no graph, and every cell is a job of its own.
            groups.setdefault(f"{name} steps" if each.row else each.ready.graph, []).append(each)
        self.waiting = [self._job([self._task(each) for each in group], group) for group in groups.values()]

    def _note_maker(self, each: Standing) -> None:
        key, row = each.ready.calibration, each.row
        if key and row is not None:
            self._makers.setdefault(key, row.calibration or row.cell)

    def _task(self, each: Standing) -> Task:
        ready, row = each.ready, each.row
        # What lies there without being a whole artifact of this request is replaced where it is an artifact.
        force = (ready.request.output / MANIFEST).is_file()
        asked = replace(ready.request, force=force)
        return Task(ready.cell, asked, ready.dtype, self._first[ready.cell.name], row is not None, row)

    def _job(self, tasks: Sequence[Task], group: Sequence[Standing]) -> Job:
        ready, request = group[0].ready, self.request
        return Job(
            tuple(tasks),
            ready.needs,
            ready.graph,
            "" if group[0].row else ready.calibration,
            request.folder,
            self.token,
            request.artifacts,
            self.calibrations.address,
            request.steps,
            code_of_diffc(),
        )

    def next_jobs(self) -> list[Job]:
        """The jobs that can begin now: of several with one calibration the first alone, until it has made it."""
        begun = []
        for job in list(self.waiting):
            key = job.calibration
            known = bool(key) and self.calibrations.known(key)
            if key and not known and any(other.calibration == key for other in self.running.values()):
                continue
            self.waiting.remove(job)
            maker = self._makers.get(key, "") if known else ""
            job = replace(job, source=maker)
            if key:
                self._makers.setdefault(key, job.name)
            self.running[job.name] = job
            begun.append(job)
        return begun

    def ended(self, name: str, attempt: Attempt, rows: Sequence[Row]) -> list[Row]:
        """The rows of a job that has ended; `rows` are those that its process wrote.

        Of the cells without one, the first was being worked on when the process died: it is lost, and tried again if a
        try is left. Those after it were not begun, and wait as they were.
        """
        job = self.running.pop(name)
        found, written = list(rows), {row.cell for row in rows}
        if job.calibration and not self.calibrations.known(job.calibration):
            self._makers.pop(job.calibration, None)
        left = [task for task in job.tasks if task.cell.name not in written]
        while left and (row := self._was_finished(left[0], job, attempt)):
            found.append(row)
            left.pop(0)
        if left:
            row = _died(left[0], job, attempt)
            found.append(row)
            used = left[0].attempt - self._first[left[0].cell.name] + 1
            again = row.status == LOST and used < self.request.tries
            left = [replace(left[0], attempt=left[0].attempt + 1), *left[1:]] if again else left[1:]
        if left:
            self.waiting.insert(0, replace(job, tasks=tuple(left)))
        return found

    def _was_finished(self, task: Task, job: Job, attempt: Attempt) -> Row | None:
        """The row of a cell whose artifact was finished when its worker died; None where it was not."""
        stands = _stand(self.request, self._ready[task.cell.name], {}, self.store)
        if not isinstance(stands, Standing) or stands.row is None or task.there:
            return None
        values = {"attempt": task.attempt, "needs": job.needs, "worker": attempt.worker}
        return msgspec.structs.replace(stands.row, **values)


def _died(task: Task, job: Job, attempt: Attempt) -> Row:
    """The row of the cell that a process was at when it died: "lost" by somebody else's hand, "failed" for a crash."""
    reason = attempt.died or "its process ended without a word"
    values = {"attempt": task.attempt, "needs": job.needs, "worker": attempt.worker}
    if attempt.crashed:
        message = f"the process of the compile crashed ({reason})\n  Fix: run diffc compile with its options"
        return row_of(task.cell, task.dtype, status=FAILED, message=message, **values)
    message = f"the worker died ({reason})\n  Fix: look at its machine's memory; the same sweep goes on"
    return row_of(task.cell, task.dtype, status=LOST, message=message, **values)


def rows_of(attempt: Attempt) -> list[Row]:
    """The rows that the process of a job wrote."""
    return [msgspec.json.decode(line, type=Row) for line in attempt.rows]
