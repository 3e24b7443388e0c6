"""What a sweep writes of its cells: `sweep.jsonl`, a line for each attempt, and `sweep.json`, the last of each cell.

docs/sweep.md has the fields as a table. Readers take `Row` and `Summary` from here.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from diffc.errors import DiffcError
from diffc.records import Count, Positive, Seconds, Text, of_pass_error, parse_record, read_record
from passes.base import PassError
from passes.files.bounded import read_text

LINES, SUMMARY = "sweep.jsonl", "sweep.json"
SCHEMA = 1
"""The form of both files."""
DONE: Final = "done"
REFUSED: Final = "refused"
FAILED: Final = "failed"
LOST: Final = "lost"
Status = Literal["done", "refused", "failed", "lost"]
"""done: the artifact is there. refused: hardware or compiler lack this combination, known before any work. failed: one
message says why. lost: the worker died, and the cell is tried again; as the last row of a cell, no try was left."""
_AGAIN = "run the sweep again: it goes on with what is there"


class Step(Struct, forbid_unknown_fields=True):
    """What `--validate`, `--bench` or `--evaluate` found of a cell: the --json of that command, or one message."""

    status: Literal["done", "failed"]
    seconds: Seconds
    message: str = ""
    result: dict[str, Any] = {}


class Row(Struct, forbid_unknown_fields=True):
    """One attempt at a cell. `cell` is its name, which is that of its folder in the sweep's, or under --artifacts.

    `sm` is None where no engine is built. `cache_plan` is empty and `loras` has no entry where the cell has none.
    `dtype` is the compute type, empty for a cell that was refused. `message` is empty for a cell that is done.
    `attempt` counts from 1; it is 0 for a cell that was refused before any work, and for an artifact that was found
    without a row. `seconds` are those of the compile; `peak_memory` in bytes, of its process; `needs`: bytes that were
    set aside. `worker`: machine and process. `artifact`: folder or address. `sizes`: bytes of "weights", "graphs",
    "engines" and "all". `errors`: the largest relative L2 error against torch, by what ONNX Runtime computed in.
    `calibration` and `graph`: the cells that these were taken from, empty where the cell made its own. `started`: UTC.
    """

    cell: Text
    model: Text
    format: Text
    sm: Positive | None
    cache_plan: str
    loras: list[str]
    dtype: str
    status: Status
    message: str = ""
    attempt: Count = 0
    started: str = ""
    seconds: Seconds | None = None
    peak_memory: Count | None = None
    needs: Count | None = None
    worker: str = ""
    artifact: str = ""
    sizes: dict[str, Count] = {}
    errors: dict[str, float] = {}
    calibration: str = ""
    graph: str = ""
    steps: dict[str, Step] = {}


class Summary(Struct, forbid_unknown_fields=True):
    """The whole sweep. `cells`: the last row of each, in the order of the axes. `command`: what repeats it.

    `counts` has a number for each status, "cells" and "attempts". `seconds` are those of all runs together, `runs` how
    often the command was called. `axes`: the values of model, format, sm, cache_plan, lora and dtype. `state` is
    "running" while cells are left.
    """

    schema: Positive
    diffc: str
    versions: dict[str, str]
    command: list[str]
    state: Literal["running", "finished", "stopped"]
    started: str
    seconds: Seconds
    runs: Positive
    workers: Count
    address: str
    axes: dict[str, list[str]]
    counts: dict[str, Count]
    cells: list[Row]


def read_rows(folder: Path) -> list[Row]:
    """The rows of a sweep's folder in the order in which they were written; a last line that was cut off is left out.

    Raises DiffcError when another line is damaged.
    """
    path = folder / LINES
    if not path.exists():
        return []
    try:
        lines = read_text(path).split("\n")
    except PassError as error:
        raise of_pass_error(error, _AGAIN) from error
    if lines[-1]:  # every whole line ends in a line feed
        lines[-1] = ""
    return [_row(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _row(line: str, what: str) -> Row:
    return msgspec.convert(parse_record(line, what, Row, fix="take that line out"), Row)


def read_summary(folder: Path) -> Summary:
    """The summary of a sweep's folder. Raises DiffcError when there is none, or it is damaged."""
    if not (folder / SUMMARY).is_file():
        raise DiffcError(f"{folder} has no {SUMMARY}", fix="give the folder that `diffc sweep` wrote")
    return msgspec.convert(read_record(folder / SUMMARY, Summary, fix=_AGAIN), Summary)


def line_of(row: Row) -> str:
    """The row as a line of sweep.jsonl, with its end."""
    return msgspec.json.encode(row, order="deterministic").decode() + "\n"


def now() -> str:
    """The time as rows and summaries have it: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is one that a sweep has written to."""
    return (folder / SUMMARY).is_file()


def last_rows(rows: list[Row]) -> dict[str, Row]:
    """The last row of each cell, by its name."""
    return {row.cell: row for row in rows}
