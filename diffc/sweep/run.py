"""`diffc sweep`: every cell compiled once, by the workers that there are; a row for each, whatever happens."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from filelock import Timeout

from diffc.errors import DiffcError, UsageError
from diffc.locks import locked
from diffc.sweep.book import Book
from diffc.sweep.job import Job
from diffc.sweep.jobs import Board, Standing, rows_of, standing
from diffc.sweep.machine import memory_of, threads_of, workers_of
from diffc.sweep.prepare import prepare
from diffc.sweep.ray_runner import RayRunner, check_ray
from diffc.sweep.request import RAY, SweepRequest
from diffc.sweep.rows import Row, Summary
from diffc.sweep.runners import Processes, Runner
from diffc.sweep.store import SharedCalibrations, Store
from diffc.sweep.work import OWN

_POLL = 0.5
"""Seconds between two looks at what has ended."""


class Watcher(Protocol):
    """Sees a sweep go on."""

    def known(self, cells: Sequence[Standing | Row], workers: int) -> None:
        """Where every cell stands before the first job begins."""
        ...

    def begun(self, job: Job) -> None:
        """A job was given to the workers."""
        ...

    def row(self, row: Row) -> None:
        """A row was written."""
        ...

    def tick(self) -> None:
        """Time has passed."""
        ...


def look(request: SweepRequest) -> tuple[list[Standing | Row], Book]:
    """Where every cell stands, and the rows so far: what `--dry-run` tells. Nothing is written.

    Raises DiffcError for axes without a cell, and for what is wrong with every cell.
    """
    cells = request.axes.cells(request.exclude)
    check_folder(request.folder)
    book = Book(request, cells)
    return standing(request, prepare(request, cells), book, _store(request)), book


def check_folder(folder: Path) -> None:
    """Raise UsageError when `folder` is an artifact or a file."""
    if folder.is_file() or (folder / "manifest.json").is_file():
        raise UsageError(
            f"{folder} is {'a file' if folder.is_file() else 'an artifact'}, not a folder of a sweep",
            fix="name another folder with -o: the artifacts of the cells go into it",
        )


def sweep(request: SweepRequest, watcher: Watcher) -> Summary:
    """Run a sweep to its end, and return what became of its cells.

    Cells that are finished are not run again. Raises DiffcError before any work for what is wrong with the whole; what
    is wrong with a cell is in its row.
    """
    if request.runner == RAY:
        check_ray(request.address)
    begun = time.perf_counter()
    with _alone(request.folder):
        stands, book = look(request)
        store = _store(request)
        book.begin()
        workers = workers_of(request)
        with _token(request.folder) as token:
            calibrations = SharedCalibrations(store or Store((request.folder / OWN).as_uri()))
            board = Board(request, book, store, calibrations, token)
            board.fill([each for each in stands if isinstance(each, Standing)])
            _settled(stands, book)
            try:
                if board.waiting:
                    with _runner(request, workers) as runner:
                        book.workers = getattr(runner, "workers", workers)
                        watcher.known(stands, book.workers)
                        _drive(board, runner, watcher, begun)
                else:
                    watcher.known(stands, 0)
            except BaseException:
                book.write("stopped", time.perf_counter() - begun)
                raise
        return book.write("finished", time.perf_counter() - begun)


def _settled(stands: Sequence[Standing | Row], book: Book) -> None:
    """Write the rows of cells that no worker gets, unless the last row of the cell says the same."""
    last = book.last
    for each in stands:
        row = each if isinstance(each, Row) else each.row
        before = None if row is None else last.get(row.cell)
        if row is not None and (
            before is None or (before.status, before.message) != (row.status, row.message)
        ):
            book.add(row, 0.0)


def _drive(board: Board, runner: Runner, watcher: Watcher, begun: float) -> None:
    """Give jobs to the workers until none is left."""
    while board.waiting or board.running:
        for job in board.next_jobs():
            runner.submit(job.name, pickle.dumps(job), job.needs)
            watcher.begun(job)
        for name, attempt in runner.finished(_POLL):
            for row in board.ended(name, attempt, rows_of(attempt)):
                board.book.add(row, time.perf_counter() - begun)
                watcher.row(row)
        watcher.tick()


@contextmanager
def _runner(request: SweepRequest, workers: int) -> Iterator[Runner]:
    logs = request.folder / OWN / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    memory, threads = memory_of(request), threads_of(request)
    runner: Runner
    if request.runner == RAY:
        runner = RayRunner(request.address, workers, memory, threads, str(logs))
    else:
        runner = Processes(workers, memory, threads, str(logs))
    try:
        yield runner
    finally:
        runner.close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / f"{OWN}.lock"):
            yield
    except Timeout as error:
        raise DiffcError(
            f"another sweep is writing to {folder}", fix="wait for it, or choose another -o"
        ) from error


@contextmanager
def _token(folder: Path) -> Iterator[str]:
    """The name of a file by which a worker knows that it sees the folder of this sweep."""
    token = f"sweep-{uuid4().hex}"
    (folder / OWN).mkdir(exist_ok=True)
    (folder / OWN / token).touch()
    try:
        yield token
    finally:
        (folder / OWN / token).unlink(missing_ok=True)


def _store(request: SweepRequest) -> Store | None:
    return Store(request.artifacts) if request.artifacts else None
