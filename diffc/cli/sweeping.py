"""What `diffc sweep` does with its options: the request of all cells, the run, and what is printed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from diffc.cli.compile import request_of
from diffc.cli.mix import bytes_of
from diffc.cli.sweep_options import TYPED
from diffc.errors import DiffcError, UsageError, unknown_value
from diffc.progress_bar import duration
from diffc.sweep.cells import NONE, Axes
from diffc.sweep.live import Progress, cells_table, described, planned_table
from diffc.sweep.request import Steps, SweepRequest
from diffc.sweep.rows import DONE, FAILED, LOST, REFUSED, Row, Summary
from diffc.sweep.run import look, sweep

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

METRICS = ("psnr", "ssim")
"""Metrics that need no network of the user's."""
_OF_A_CELL: Mapping[str, Any] = {
    "model": "",
    "format": "auto",
    "sm": None,
    "dtype": "auto",
    "lora": None,
    "cache_plan": "",
    "force": False,
    "dump": None,
    "save_checkpoint": None,
}
"""Options of compile that are those of a cell, or of a single compile."""


def request_of_sweep(own: Mapping[str, Any], of_compile: Mapping[str, Any]) -> SweepRequest:
    """The request of the options of `diffc sweep` and those of compile. Raises UsageError."""
    if not own["model"]:
        raise UsageError(
            "the sweep has no model", fix="give --model A B, or a file with a line model: [A, B]"
        )
    sms, folder = _split(own["sm"]), own["output"].expanduser().absolute()
    axes = Axes(
        _split(own["model"], ()),
        _split(own["format"]) or ["auto"],
        sms,
        own["cache_plan"] or [NONE],
        own["lora"] or [NONE],
        _split(own["dtype"]) or ["auto"],
    )
    target = of_compile["target"] or (["ort", "trt-rtx"] if sms else ["ort"])
    base = request_of({**of_compile, **_OF_A_CELL, "target": target, "output": folder})
    return SweepRequest(
        axes,
        base,
        folder,
        tuple(own["exclude"] or ()),
        own["artifacts"],
        own["runner"],
        own["workers"],
        None if own["memory"] is None else bytes_of(own["memory"], "--memory"),
        own["address"],
        own["tries"],
        _steps(own),
        own["force"],
        TYPED.get(),
    )


def _split(values: Sequence[str] | None, separators: Sequence[str] = (",",)) -> list[str]:
    """The values of an option, those with a comma in them taken apart."""
    parts = [part.strip() for text in values or () for part in (text.split(",") if separators else [text])]
    return [part for part in parts if part]


def _steps(own: Mapping[str, Any]) -> Steps:
    metrics = _split(own["evaluate"])
    for metric in metrics:
        if metric not in METRICS:
            fix = "the others need networks: diffc evaluate --data-path SWEEP/pictures/CELL/pictures.json"
            raise unknown_value("metric of --evaluate", metric, METRICS, fix=fix)
    sides = None if own["bench"] is None else tuple(_split(own["bench"]))
    prompts = tuple(own["prompt"] or ())
    return Steps(own["validate"], sides, own["bench_repeat"], tuple(metrics), prompts, own["paint_steps"])


def run(request: SweepRequest, terminal: Terminal, *, dry_run: bool) -> None:
    """Run the sweep, or say what it would do. Raises DiffcError when a cell failed."""
    if dry_run:
        stands, book = look(request)
        terminal.print(planned_table(stands, book))
        for row in (each for each in stands if isinstance(each, Row)):
            terminal.line(_said(row.cell, row.message))
        terminal.line(f"Nothing was written to {request.folder}")
        terminal.result(described(stands, book))
        return
    with Progress(quiet=terminal.quiet) as progress:
        try:
            summary = sweep(request, progress)
        except KeyboardInterrupt:
            progress.say("stopped: the same command goes on with the cells that are done")
            raise
    _told(summary, terminal)
    _require_done(summary)


def _told(summary: Summary, terminal: Terminal) -> None:
    terminal.print(cells_table(summary.cells))
    for row in summary.cells:
        if row.message:
            terminal.line((_said(row.cell, row.message), "yellow" if row.status == REFUSED else "red"))
        for name, step in row.steps.items():
            if step.message:
                terminal.line((_said(f"{row.cell}, {name}", step.message), "red"))
    counts = ", ".join(
        f"{n} {status}" for status in (DONE, REFUSED, FAILED, LOST) if (n := summary.counts[status])
    )
    terminal.line(
        f"{summary.counts['cells']} cells: {counts}; {duration(summary.seconds)} in all runs together"
    )
    terminal.result(msgspec.to_builtins(summary))


def _said(what: str, message: str) -> str:
    """A message of a row in one line."""
    return f"{what}: {'. '.join(part.strip() for part in message.splitlines())}"


def _require_done(summary: Summary) -> None:
    """Raise DiffcError when a cell failed or was lost, or a step after one failed."""
    bad = [row.cell for row in summary.cells if row.status in (FAILED, LOST)]
    steps = [row.cell for row in summary.cells if any(step.status == FAILED for step in row.steps.values())]
    wrong = list(dict.fromkeys([*bad, *steps]))
    if wrong:
        more = ", ..." if len(wrong) > 3 else ""
        raise DiffcError(
            f"{len(wrong)} of {summary.counts['cells']} cells failed: {', '.join(wrong[:3])}{more}",
            fix="see their messages above; the same command goes on with what is there",
        )
