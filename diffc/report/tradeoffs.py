"""Size, latency and quality of several artifacts against each other: charts with their front, and a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from markupsafe import Markup
from msgspec import Struct

from diffc.report import charts, words
from diffc.report.points import Point

_LOW = ("lpips", "clip-fid", "fid", "error")
"""Measures of quality of which little is good."""
COMPILED = "compiled"


class _BenchRow(Struct):
    side: str
    median: float | None = None


class Bench(Struct):
    """Of what `diffc bench --json` writes: the median of each side, seconds a step; None where it failed."""

    rows: list[_BenchRow]


class _Mean(Struct):
    mean: float


class _Score(Struct):
    model: str
    metric: str
    value: _Mean


class Scores(Struct):
    """Of what `diffc evaluate --json` writes: a mean for each model and metric."""

    reference: str
    scores: list[_Score]


@dataclass(frozen=True)
class Outcome:
    """One artifact, or torch: bytes of weights, milliseconds a step, quality by measure. None: not known."""

    label: str
    group: str
    size: float | None
    latency: float | None = None
    quality: Mapping[str, float] = field(default_factory=dict)


def medians(bench: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds a step by side, of the first shape. `bench`: what `diffc bench --json` wrote, checked as `Bench`."""
    found: dict[str, float] = {}
    for row in msgspec.convert(bench, Bench).rows:
        if row.median is not None:
            found.setdefault(row.side, 1e3 * row.median)
    return found


def quality_of(scores: Mapping[str, Any], model: str | None = None) -> dict[str, float]:
    """The mean of each metric of `model`; None: of the one model that is not the reference.

    `scores`: what `diffc evaluate --json` wrote, checked as `Scores`.
    """
    held = msgspec.convert(scores, Scores)
    names = [model] if model else [s.model for s in held.scores if s.model != held.reference]
    return {s.metric: s.value.mean for s in held.scores if names and s.model == names[0]}


def tradeoffs(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    """Charts and table; None where there is nothing to trade: one measure, or one artifact."""
    measures = list(dict.fromkeys(name for outcome in outcomes for name in outcome.quality))
    drawn = list(_charts(outcomes, measures))
    if not drawn:
        return None
    rows = [
        (
            outcome.label,
            words.size(outcome.size),
            "-" if outcome.latency is None else f"{outcome.latency:.1f}",
            *(f"{outcome.quality[name]:.4g}" if name in outcome.quality else "-" for name in measures),
        )
        for outcome in outcomes
    ]
    columns = ["", "weights", "ms a step", *measures]
    return {"charts": drawn, "columns": columns, "rows": rows, "numbers": tuple(range(1, len(columns)))}


def _charts(outcomes: Sequence[Outcome], measures: Sequence[str]) -> Iterator[Markup]:
    sizes = {o.label: o.size / 1e6 for o in outcomes if o.size}
    latencies = {o.label: o.latency for o in outcomes if o.latency}
    groups = {o.label: o.group for o in outcomes}

    def pairs(x: Mapping[str, float], y: Mapping[str, float]) -> list[Point]:
        return [Point(label, x[label], y[label], groups[label]) for label in x if label in y]

    if len(points := pairs(sizes, latencies)) > 1:
        yield charts.front(points, "weights, MB", "ms a step", "Latency against size of weights")
    for name in measures:
        values = {o.label: o.quality[name] for o in outcomes if math.isfinite(o.quality.get(name, math.nan))}
        high = name not in _LOW
        for x, text in ((sizes, "weights, MB"), (latencies, "ms a step")):
            if len(points := pairs(x, values)) > 1:
                yield charts.front(points, text, name, f"{name} against {text}", high=high)
