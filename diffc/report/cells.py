"""What the page shows of a sweep: its cells, what went wrong, their trade-offs, and each artifact in short."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from diffc.errors import DiffcError
from diffc.report import words
from diffc.report.subject import Subject, subject_of
from diffc.report.tradeoffs import COMPILED, Bench, Outcome, Scores, medians, quality_of
from diffc.sweep.rows import DONE, Row, Summary
from passes.base import PassError
from passes.files.contained import why_outside

MOST = 60
"""Artifacts of a sweep that the page shows one by one."""


def sweep_view(summary: Summary) -> dict[str, Any]:
    """Figures, the table of cells, and the messages of those that are not done."""
    measures = list(dict.fromkeys(name for row in summary.cells for name in outcome_of(row).quality))
    kinds = list(dict.fromkeys(name for row in summary.cells for name in row.errors))
    columns = ["cell", "status", "weights", "engines", "time", "memory"]
    columns += [f"error, {kind}" for kind in kinds] + ["ms a step", *measures]
    cards: list[tuple[str, Any]] = [(name, number) for name, number in summary.counts.items()]
    cards += [
        ("State", summary.state),
        ("Time", words.seconds(summary.seconds)),
        ("Workers", summary.workers),
    ]
    cards += [(axis, ", ".join(values) or "-") for axis, values in summary.axes.items()]
    return {
        "cards": cards,
        "columns": columns,
        "rows": [_cells(row, kinds, measures) for row in summary.cells],
        "numbers": tuple(range(2, len(columns))),
        "messages": [(row.cell, text) for row in summary.cells for text in _messages(row)],
        "command": shlex.join(summary.command),
    }


def _cells(row: Row, kinds: list[str], measures: list[str]) -> list[str]:
    outcome = outcome_of(row)
    return [
        row.cell,
        row.status,
        words.size(row.sizes.get("weights")),
        words.size(row.sizes.get("engines")),
        words.seconds(row.seconds),
        words.size(row.peak_memory),
        *(words.error(row.errors.get(kind)) for kind in kinds),
        "-" if outcome.latency is None else f"{outcome.latency:.1f}",
        *(f"{outcome.quality[name]:.4g}" if name in outcome.quality else "-" for name in measures),
    ]


def _messages(row: Row) -> Iterator[str]:
    if row.message:
        yield f"{row.status}: {row.message}"
    yield from (f"{name}: {step.message}" for name, step in row.steps.items() if step.message)


def outcome_of(row: Row) -> Outcome:
    """A cell as a point: what its `--bench` and `--evaluate` found, where they are of the form that diffc writes."""
    bench, scores = (row.steps.get(name) for name in ("bench", "evaluate"))
    latency, quality = None, dict[str, float]()
    if bench is not None and _is(bench.result, Bench):
        latency = medians(bench.result).get(COMPILED)
    if scores is not None and _is(scores.result, Scores):
        quality = quality_of(scores.result)
    return Outcome(row.cell, row.model, row.sizes.get("weights"), latency, quality)


def _is(value: Any, schema: type[msgspec.Struct]) -> bool:
    try:
        msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError:
        return False
    return True


def subjects_of(folder: Path, summary: Summary) -> Iterator[Subject]:
    """The artifacts of the cells that are done and lie in the sweep's own folder, the first MOST of them."""
    found = 0
    for row in summary.cells:
        if row.status != DONE or why_outside(folder, row.cell) or found == MOST:
            continue
        try:
            yield subject_of(folder / row.cell)
            found += 1
        except (DiffcError, PassError):
            continue  # it lies under --artifacts, or was moved; its row says what is known of it
