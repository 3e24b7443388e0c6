"""Which layer gets which format: the least error of the output within a size, as a plan that users can edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError, UsageError
from passes.files.atomic import write_text

Noise = Mapping[str, float]
"""Format -> what it adds to the squared error of the output, in the units of the output's square."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor (q, k and v), which one kernel can compute if their formats are alike.

    `bits` are those that each format stores for all of their weights together.
    """

    layers: tuple[str, ...]
    noise: Noise
    bits: Mapping[str, float]


def choose(groups: Sequence[Group], budget: float) -> list[str]:
    """A format for each group: the least noise in all that `budget` bits allow, as far as steps of best value find it.

    Noises are taken to add up. From the smallest format of each group on, the step that removes the most noise for a
    bit is taken as long as it fits; of each group only steps on its lower convex hull are looked at, so an order by
    value is an order in which each group's steps come one after another. Raises UsageError when nothing fits.
    """
    hulls = [_hull(group) for group in groups]
    chosen = [0] * len(groups)
    used = sum(group.bits[hull[0]] for group, hull in zip(groups, hulls, strict=True))
    if used > budget:
        raise UsageError(
            f"{budget / 8e9:.3g} GB are asked for, and the smallest formats take {used / 8e9:.3g} GB",
            fix="ask for more, or add a smaller --format",
        )
    steps = sorted(
        (
            (_value(group, hull[at], hull[at + 1]), number, at + 1)
            for number, (group, hull) in enumerate(zip(groups, hulls, strict=True))
            for at in range(len(hull) - 1)
        ),
        reverse=True,
    )
    stopped = set[int]()
    for _, number, at in steps:
        group, hull = groups[number], hulls[number]
        more = group.bits[hull[at]] - group.bits[hull[at - 1]]
        if number in stopped or used + more > budget:
            stopped.add(number)  # a later step of this group would leave one out
            continue
        chosen[number], used = at, used + more
    return [hull[at] for hull, at in zip(hulls, chosen, strict=True)]


def _hull(group: Group) -> list[str]:
    """The formats on the lower convex hull of noise over bits, from the smallest on."""
    order = sorted(group.noise, key=lambda name: (group.bits[name], group.noise[name]))
    hull: list[str] = []
    for name in order:
        if hull and (group.noise[name] >= group.noise[hull[-1]] or group.bits[name] == group.bits[hull[-1]]):
            continue
        while len(hull) > 1 and _value(group, hull[-2], hull[-1]) <= _value(group, hull[-1], name):
            hull.pop()
        hull.append(name)
    return hull


def _value(group: Group, smaller: str, larger: str) -> float:
    """Noise that a step to a larger format removes, for each bit."""
    return (group.noise[smaller] - group.noise[larger]) / (group.bits[larger] - group.bits[smaller])


def total_bits(groups: Sequence[Group], formats: Sequence[str]) -> float:
    """Bits that the weights take in these formats, one for each group."""
    return sum(group.bits[name] for group, name in zip(groups, formats, strict=True))


def write_plan(file: Path, formats: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Write a plan: the format of each layer, by path, and what was measured."""
    write_text(file, json.dumps({**about, "formats": formats}, indent=1) + "\n")


def read_plan(file: Path) -> dict[str, str]:
    """The format of each layer in a plan, as `write_plan` writes it. Raises DiffcError for any other file."""
    try:
        formats = json.loads(file.read_text(encoding="utf-8-sig"))["formats"]
        if not isinstance(formats, dict) or not all(isinstance(v, str) for v in formats.values()):
            raise ValueError("'formats' is no object of texts")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DiffcError(
            f"cannot read the plan {file}: {error}", fix='write {"formats": {"PATH OF A LAYER": "fp8"}}'
        ) from error
    return formats
