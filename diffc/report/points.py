"""Points of a trade-off: which of them nothing beats, and the shortest names that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A dot of a chart: small `x` and small `y` are good. Points of one `group` have one colour."""

    label: str
    x: float
    y: float
    group: str = ""


def pareto(points: Sequence[Point], *, high: bool = False) -> list[Point]:
    """The points that no other one beats in both, from the smallest `x` on. `high`: a large `y` is good."""
    sign, best = -1 if high else 1, list[Point]()
    for point in sorted(points, key=lambda p: (p.x, sign * p.y)):
        if not best or sign * point.y < sign * best[-1].y:
            best.append(point)
    return best


def distinct(labels: Sequence[str]) -> list[str]:
    """Labels without the words that all of them begin or end with, where something is left: fp8 of digits-fp8-sm89."""
    words = [label.split("-") for label in labels]
    least = min(map(len, words), default=0)
    first = next((i for i in range(least) if len({w[i] for w in words}) > 1), 0)
    last = next((i for i in range(least - first) if len({w[-1 - i] for w in words}) > 1), 0)
    return ["-".join(w[first : len(w) - last]) or label for w, label in zip(words, labels, strict=True)]
