"""The rows and the summary of a sweep: written as they come in, and taken up by the next run."""

from __future__ import annotations

from pathlib import Path

from diffc.sweep.book import Book
from diffc.sweep.cells import Axes
from diffc.sweep.prepare import row_of
from diffc.sweep.rows import DONE, FAILED, LINES, LOST, read_rows, read_summary
from tests.sweep.test_prepare import sweep_of


def book(folder: Path) -> Book:
    sweep = sweep_of(folder, Axes(["m", "n"], ["fp8"]), command=("diffc", "sweep"))
    made = Book(sweep, sweep.axes.cells())
    made.begin()
    return made


def test_the_summary_has_the_last_row_of_each_cell_in_the_order_of_the_axes(tmp_path: Path) -> None:
    made = book(tmp_path)
    m, n = made._cells
    for cell, status in ((n, FAILED), (m, LOST), (m, DONE)):
        made.add(row_of(cell, "float16", status=status, attempt=1), 2.0)
    found = read_summary(tmp_path)
    assert [(row.cell, row.status) for row in found.cells] == [("m-fp8", DONE), ("n-fp8", FAILED)]
    assert found.counts == {"done": 1, "refused": 0, "failed": 1, "lost": 0, "cells": 2, "attempts": 3}
    assert (found.state, found.runs, found.seconds, found.command) == ("running", 1, 2.0, ["diffc", "sweep"])
    assert found.axes["model"] == ["m", "n"]


def test_the_next_run_goes_on_with_the_rows_and_adds_its_seconds(tmp_path: Path) -> None:
    first = book(tmp_path)
    first.add(row_of(first._cells[0], "float16", status=DONE, attempt=1, seconds=7.0), 2.0)
    second = book(tmp_path)
    assert second.last.keys() == {"m-fp8"}
    found = second.write("finished", 3.0)
    assert (found.runs, found.seconds, len(found.cells)) == (2, 5.0, 1)
    assert second.seconds_of(second._cells[0]) == 7.0
    assert second.seconds_of(second._cells[1]) is None


def test_a_line_that_was_cut_off_goes_before_the_next_is_written(tmp_path: Path) -> None:
    first = book(tmp_path)
    first.add(row_of(first._cells[0], "float16", status=DONE), 0.0)
    with (tmp_path / LINES).open("ab") as file:
        file.write(b'{"cell":"n-fp8","mod')
    second = book(tmp_path)
    second.add(row_of(second._cells[1], "float16", status=DONE), 0.0)
    assert [row.cell for row in read_rows(tmp_path)] == ["m-fp8", "n-fp8"]
