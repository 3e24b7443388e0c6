"""What a sweep writes is what is read of it, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.errors import DiffcError
from diffc.sweep.rows import DONE, LINES, LOST, Row, Step, last_rows, line_of, read_rows, read_summary


def row(cell: str = "tiny-sd3-fp8", status: str = DONE, attempt: int = 1) -> Row:
    """A row with a value in every kind of field."""
    return Row(
        cell, "tiny-sd3", "fp8", 89, "", ["a.safetensors=0.5"], "float16", status, "", attempt,  # type: ignore[arg-type]
        "2031-01-01T00:00:00Z", 1.5, 1 << 30, 2 << 30, "here:17", "out/tiny-sd3-fp8", {"all": 3}, {"float16": 1e-3},
        steps={"validate": Step(DONE, 0.5, "", {"passed": True})},
    )  # fmt: skip


def test_rows_come_back_in_order_and_the_last_of_a_cell_counts(tmp_path: Path) -> None:
    rows = [row(status=LOST), row("other"), row(attempt=2)]
    (tmp_path / LINES).write_text("".join(map(line_of, rows)), encoding="utf-8")
    assert read_rows(tmp_path) == rows
    assert last_rows(rows) == {"tiny-sd3-fp8": rows[2], "other": rows[1]}


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    (tmp_path / LINES).write_text(line_of(row()) + line_of(row("other"))[:40], encoding="utf-8")
    assert read_rows(tmp_path) == [row()]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    text = line_of(row()) + line_of(row()).replace('"attempt":1', '"attempt":"x"') + line_of(row())
    (tmp_path / LINES).write_text(text, encoding="utf-8")
    with pytest.raises(DiffcError, match=r"sweep\.jsonl, line 2 is damaged.*attempt"):
        read_rows(tmp_path)


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    with pytest.raises(DiffcError, match=r"has no sweep\.json"):
        read_summary(tmp_path)
