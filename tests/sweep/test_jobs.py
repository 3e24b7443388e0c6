"""Which cells are one job, which job waits for another's calibration, and what becomes of one whose worker died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffc.quantize.folder import RECORD
from diffc.sweep.book import Book
from diffc.sweep.cells import Axes, Cell
from diffc.sweep.jobs import Board, Standing, standing
from diffc.sweep.prepare import Ready, row_of
from diffc.sweep.request import Steps, SweepRequest
from diffc.sweep.rows import DONE, FAILED, LOST, Row, Step
from diffc.sweep.store import SharedCalibrations, Store
from diffc.sweep.worker import Attempt
from tests.sweep.test_prepare import sweep_of
from tests.sweep.test_store import artifact

KILLED = Attempt((), "SIGKILL", crashed=False, worker="here:1")
CRASHED = Attempt((), "SIGSEGV", crashed=True, worker="here:1")
ENDED = Attempt((), "", crashed=False, worker="here:1")


def ready(sweep: SweepRequest, cell: Cell, *, graph: str, calibration: str = "") -> Ready:
    request = cell.request(sweep.base, sweep.folder)
    return Ready(cell, request, 1 << 30, graph, calibration, "float16", {"seed": 0}, "fingerprint")


class Place:
    """A sweep's folder with a board of cells of two formats and GPUs; cells of a format share graph and calibration."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.sweep = sweep_of(folder, Axes(["m"], ["fp8", "int8"], ["89", "120"]), **settings)
        self.cells = self.sweep.axes.cells()
        self.store = Store((folder / "store").as_uri())
        self.book = Book(self.sweep, self.cells)
        self.book.begin()

    def ready(self, plans: Sequence[str] = ("",)) -> list[Ready]:
        cells = [replace(cell, cache_plan=plan) for cell in self.cells for plan in plans]
        return [
            ready(self.sweep, c, graph=f"{c.format}{c.cache_plan}", calibration=f"key-{c.format}")
            for c in cells
        ]

    def board(self, *plans: str) -> Board:
        board = Board(self.sweep, self.book, None, SharedCalibrations(self.store), "token")
        found = standing(self.sweep, self.ready(plans or ("",)), self.book, None)
        board.fill([each for each in found if isinstance(each, Standing)])
        return board

    def calibrated(self, format: str) -> None:
        """A calibration of this format is known from now on."""
        folder = self.sweep.folder / f"made-{format}"
        folder.mkdir()
        (folder / RECORD).write_text("{}", encoding="utf-8")
        self.store.put(folder, f".calibrations/key-{format}", RECORD)

    def compiled(self, each: Ready) -> None:
        """The artifact of a cell is there."""
        model = {"name": "m", "fingerprint": each.fingerprint}
        artifact(each.request.output, request=dict(each.described), model=model)


def names(jobs: Sequence[Any]) -> list[list[str]]:
    return [[task.cell.name for task in job.tasks] for job in jobs]


def test_cells_that_differ_in_the_gpu_alone_are_one_job(tmp_path: Path) -> None:
    board = Place(tmp_path).board()
    assert names(board.next_jobs()) == [["m-fp8-sm89", "m-fp8-sm120"], ["m-int8-sm89", "m-int8-sm120"]]
    assert board.next_jobs() == []


def test_of_one_calibration_the_first_job_goes_ahead_and_the_others_take_it(tmp_path: Path) -> None:
    place = Place(tmp_path)
    board = place.board("", "plan")
    first = board.next_jobs()
    assert names(first) == [["m-fp8-sm89", "m-fp8-sm120"], ["m-int8-sm89", "m-int8-sm120"]]
    assert board.next_jobs() == []
    place.calibrated("int8")  # while its job runs
    (second,) = board.next_jobs()
    assert names([second]) == [["m-int8-sm89-plan", "m-int8-sm120-plan"]]
    assert (first[1].source, second.source) == ("", "m-int8-sm89")


def test_when_the_first_job_fails_the_next_makes_the_calibration(tmp_path: Path) -> None:
    place = Place(tmp_path)
    board = place.board("", "plan")
    first, _ = board.next_jobs()
    rows = [row_of(task.cell, "float16", status=FAILED, message="no", attempt=1) for task in first.tasks]
    assert board.ended(first.name, ENDED, rows) == rows
    (second,) = board.next_jobs()
    assert (names([second])[0][0], second.source) == ("m-fp8-sm89-plan", "")


def test_cells_of_a_dead_worker_are_tried_again_as_often_as_asked(tmp_path: Path) -> None:
    board = Place(tmp_path, tries=2).board()
    first, _ = board.next_jobs()
    done = row_of(first.tasks[0].cell, "float16", status=DONE, attempt=1)
    rows = board.ended(first.name, KILLED, [done])
    assert [(row.cell, row.status, row.attempt) for row in rows] == [
        ("m-fp8-sm89", DONE, 1),
        ("m-fp8-sm120", LOST, 1),
    ]
    assert "the worker died (SIGKILL)" in rows[1].message
    (again,) = board.next_jobs()
    assert (names([again]), again.tasks[0].attempt) == ([["m-fp8-sm120"]], 2)
    assert [row.status for row in board.ended(again.name, KILLED, [])] == [LOST]
    assert board.next_jobs() == []


def test_a_crash_is_not_tried_again(tmp_path: Path) -> None:
    board = Place(tmp_path).board()
    first, _ = board.next_jobs()
    (row,) = board.ended(first.name, CRASHED, [])
    assert (row.cell, row.status) == ("m-fp8-sm89", FAILED)
    assert "crashed (SIGSEGV)" in row.message
    assert names(board.next_jobs()) == [["m-fp8-sm120"]]


def test_a_cell_that_was_not_begun_is_not_lost(tmp_path: Path) -> None:
    board = Place(tmp_path).board()
    first, _ = board.next_jobs()
    (row,) = board.ended(first.name, KILLED, [])
    assert (row.cell, row.status) == ("m-fp8-sm89", LOST)
    (again,) = board.next_jobs()
    assert [task.attempt for task in again.tasks] == [2, 1]


def test_an_artifact_that_was_finished_when_its_worker_died_is_not_made_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    board = place.board()
    first, _ = board.next_jobs()
    place.compiled(place.ready()[0])
    rows = board.ended(first.name, KILLED, [])
    assert [(row.cell, row.status) for row in rows] == [("m-fp8-sm89", DONE), ("m-fp8-sm120", LOST)]
    assert rows[0].sizes["engines"] == len(b"engine")
    assert names(board.next_jobs()) == [["m-fp8-sm120"]]


def test_finished_cells_are_left_out_and_their_calibration_is_named(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.compiled(place.ready()[0])
    place.book.add(row_of(place.cells[0], "float16", status=DONE, attempt=1), 0.0)
    place.calibrated("fp8")
    jobs = place.board().next_jobs()
    assert names(jobs) == [["m-fp8-sm120"], ["m-int8-sm89", "m-int8-sm120"]]
    assert (jobs[0].source, jobs[0].tasks[0].attempt) == ("m-fp8-sm89", 1)


def test_attempts_go_on_counting_in_the_next_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    for attempt in (1, 2, 3):
        place.book.add(row_of(place.cells[0], "float16", status=LOST, attempt=attempt), 0.0)
    job = place.board().next_jobs()[0]
    assert [task.attempt for task in job.tasks] == [4, 1]


@pytest.mark.parametrize(
    ("step", "left"), [(None, True), (Step(FAILED, 1, "no"), True), (Step(DONE, 1), False)]
)
def test_steps_that_were_not_done_are_a_job_of_their_own(
    tmp_path: Path, step: Step | None, left: bool
) -> None:
    place = Place(tmp_path, steps=Steps(validate=True))
    place.compiled(place.ready()[0])
    steps = {} if step is None else {"validate": step}
    place.book.add(row_of(place.cells[0], "float16", status=DONE, attempt=1, steps=steps), 0.0)
    jobs = place.board().next_jobs()
    assert (["m-fp8-sm89"] in names(jobs)) == left
    assert all(task.there == (task.cell == place.cells[0]) for job in jobs for task in job.tasks)


def test_a_row_without_its_artifact_is_compiled(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.book.add(row_of(place.cells[0], "float16", status=DONE, attempt=1), 0.0)
    assert names(place.board().next_jobs())[0] == ["m-fp8-sm89", "m-fp8-sm120"]


def test_a_place_that_is_taken_is_a_row(tmp_path: Path) -> None:
    place = Place(tmp_path)
    artifact(place.ready()[0].request.output, request={"seed": 5})
    found = standing(place.sweep, place.ready(), place.book, None)
    assert isinstance(found[0], Row)
    assert "was compiled from other options" in found[0].message
    assert all(isinstance(each, Standing) for each in found[1:])
