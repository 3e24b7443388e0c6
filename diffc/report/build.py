"""`diffc report`: from folders to one HTML file."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import Struct

from diffc.backends.install import install_command
from diffc.errors import DiffcError, UsageError
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.records import read_record
from diffc.report import pictures
from diffc.report.cells import outcome_of, subjects_of, sweep_view
from diffc.report.differences import differences
from diffc.report.noise import layer_noises
from diffc.report.render import page, section
from diffc.report.request import ReportRequest
from diffc.report.subject import Subject, subject_of
from diffc.report.tradeoffs import COMPILED, Bench, Outcome, Scores, medians, quality_of, tradeoffs
from diffc.report.view import outline, view_of
from diffc.sweep.rows import is_sweep, read_summary
from passes.files.atomic import write_text

LARGEST = 5_000_000
"""Bytes of a page that opens at once on a telephone and fits in a message."""
_PROMPT = "a handwritten seven"
_SECTIONS: Sequence[tuple[str, str, str]] = (
    ("summary", "Summary", ""),
    ("differences", "Differences", ""),
    ("pictures", "Pictures", "Each beside the first of its row, from the same noise."),
    ("tradeoffs", "Size, latency, quality", "The dashed line joins what nothing else beats in both."),
    (
        "passes",
        "Graph, pass by pass",
        "Nodes before and after every pass, what fired, and why a pass declined.",
    ),
    (
        "layers",
        "Layers",
        "What each weight is stored in and what its input goes through, read from model.onnx.",
    ),
    ("errors", "Errors", ""),
    ("engines", "Engines", ""),
    ("stages", "Time and memory", ""),
    ("cache", "Cache plan", ""),
    ("repeat", "Repeat it", "The command, the versions and the hashes of every file."),
)


def report(request: ReportRequest, ui: Reporter | None = None) -> int:
    """Write the page and return its bytes; what can be refused is refused before anything is painted.

    Raises DiffcError for folders that are neither artifacts nor sweeps, and for what cannot be painted or measured.
    """
    ui = ui or default_reporter()
    _check(request)
    text = _of_sweep(request, ui) if is_sweep(request.what) else _of_artifacts(request, ui)
    write_text(request.output, text)
    written = len(text.encode("utf-8"))
    if written > LARGEST:
        ui.note(
            f"{written / 1e6:.1f} MB: give fewer prompts to --paint, or fewer pictures, for a smaller file"
        )
    return written


def _check(request: ReportRequest) -> None:
    if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None:
        raise DiffcError(
            "diffc report needs jinja2 and matplotlib, and one is not installed",
            fix=install_command("report"),
        )
    if request.output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{request.output} is not the name of a page", fix="end it in .html")
    check_output_file(request.output)
    given = {
        "--against": request.against,
        "--paint": request.paint,
        "--layers": request.layers,
        "--pictures": request.pictures,
        "--bench": request.bench,
        "--scores": request.scores,
    }
    if is_sweep(request.what) and (wrong := [name for name, value in given.items() if value]):
        raise UsageError(
            f"{request.what} is a sweep, and {wrong[0]} is for an artifact",
            fix="leave it out, or give the folder of one of the sweep's cells",
        )


def _of_artifacts(request: ReportRequest, ui: Reporter) -> str:
    folders = [folder for folder in (request.what, request.against) if folder is not None]
    bench = _given(request.bench, Bench, "--bench")
    scores = _given(request.scores, Scores, "--scores")
    rows = [] if request.pictures is None else pictures.given(request.pictures)
    with ui.stage("read the artifact") as update:
        subjects = []
        for number, folder in enumerate(folders, 1):
            subjects.append(subject_of(folder))
            update(number, len(folders))
    if request.layers:
        prompt = request.paint[0] if request.paint else _PROMPT
        asked = pictures.paint_request(request, prompt, request.output)
        subjects = [
            replace(s, noise=layer_noises(s.artifact, replace(asked, compare=()), ui)) for s in subjects
        ]
    painted = pictures.painted(request, ui)
    outcomes = _outcomes(subjects, bench, scores, painted)
    with ui.stage("draw the charts"):
        return _page(subjects, [*painted, *rows], _scores(scores), outcomes)


def _page(
    subjects: Sequence[Subject],
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Any] | None,
    outcomes: Sequence[Outcome],
) -> str:
    views = [view_of(subject) for subject in subjects]
    content: dict[str, Any] = {
        "views": views,
        "pictures": rows,
        "scores": scores,
        "tradeoffs": tradeoffs(outcomes),
        "differences": differences(subjects[0], subjects[1]) if len(subjects) == 2 else None,
    }
    there = {
        "differences": len(subjects) == 2,
        "pictures": rows or scores,
        "tradeoffs": content["tradeoffs"],
        "cache": any(subject.schedule for subject in subjects),
    }
    return page(
        title=" beside ".join(subject.title for subject in subjects),
        subtitle=" beside ".join(subject.name for subject in subjects),
        sections=[section(*parts) for parts in _SECTIONS if there.get(parts[0], True)],
        **content,
    )


def _of_sweep(request: ReportRequest, ui: Reporter) -> str:
    with ui.stage("read the sweep"):
        summary = read_summary(request.what)
        views = [outline(subject) for subject in subjects_of(request.what, summary)]
    with ui.stage("draw the charts"):
        traded = tradeoffs([outcome_of(row) for row in summary.cells if row.sizes])
        rows = pictures.of_sweep(request.what, [(row.model, row.cell) for row in summary.cells])
        sections = [section("sweep", "Cells")]
        sections += [section(*parts) for parts in _SECTIONS if parts[0] == "pictures" and rows]
        sections += [section(*parts) for parts in _SECTIONS if parts[0] == "tradeoffs" and traded]
        sections += [
            section("cells", "Artifacts", "Each in short; diffc report of its folder says all.")
        ] * bool(views)
        return page(
            title=f"Sweep of {len(summary.cells)} cells",
            subtitle=f"{request.what.absolute().name}, begun {summary.started}, diffc {summary.diffc}",
            sections=sections,
            sweep=sweep_view(summary),
            pictures=rows,
            scores=None,
            tradeoffs=traded,
            cells=views,
        )


def _given(path: Path | None, schema: type[Struct], option: str) -> dict[str, Any] | None:
    """The JSON file that an option names. Raises DiffcError when it is another one."""
    command = "bench" if schema is Bench else "evaluate"
    fix = f"give {option} what `diffc {command} --json FILE` wrote"
    return None if path is None else read_record(path, schema, fix=fix)


def _scores(scores: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The table of what `diffc evaluate` found."""
    if scores is None:
        return None
    metrics = list(dict.fromkeys(score["metric"] for score in scores["scores"]))
    by_model: dict[str, dict[str, str]] = {}
    for score in scores["scores"]:
        mean, low, high = (score["value"].get(name) for name in ("mean", "low", "high"))
        interval = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
        by_model.setdefault(score["model"], {})[score["metric"]] = f"{mean:.4g}{interval}"
    rows = [(model, *(found.get(metric, "-") for metric in metrics)) for model, found in by_model.items()]
    return {"columns": ["", *metrics], "rows": rows}


def _outcomes(
    subjects: Sequence[Subject],
    bench: Mapping[str, Any] | None,
    scores: Mapping[str, Any] | None,
    painted: Sequence[Mapping[str, Any]],
) -> list[Outcome]:
    """The artifacts, and torch where it was measured. `bench` and `scores` are of the first artifact."""
    times = {} if bench is None else medians(bench)
    found = []
    for number, subject in enumerate(subjects):
        quality = pictures.mean_psnr(painted, number + 1)
        if number == 0 and scores is not None:
            quality |= quality_of(scores)
        latency = times.get(COMPILED) if number == 0 else None
        found.append(
            Outcome(
                subject.name,
                "compiled",
                subject.sizes["weights"] or subject.sizes["graphs"],
                latency,
                quality,
            )
        )
    original = subjects[0].manifest["model"].get("bytes")
    found += [
        Outcome(f"torch {side}", "torch", original, ms) for side, ms in times.items() if side != COMPILED
    ]
    return found
