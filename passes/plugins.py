"""Plugins: what installed packages add by entry points, read when it is first asked for.

A package names what it adds in its pyproject.toml, here a pass:

    [project.entry-points."passes"]
    scale-twice = "my_package.scale_twice:ScaleTwice"

A plugin that cannot be used is left out and reported: it breaks nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any


@dataclass(frozen=True)
class Broken:
    """A plugin that is left out: its group and name, the packages that name it, and the reason."""

    group: str
    name: str
    packages: tuple[str, ...]
    reason: str


@lru_cache(maxsize=16)
def named(group: str) -> dict[str, list[metadata.EntryPoint]]:
    """The entry points of a group by name, sorted; a name has several where several packages give it.

    The metadata of all installed packages is read once in a process.
    """
    points: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=group):
        if all(point.value != other.value for other in points.get(point.name, ())):
            points.setdefault(point.name, []).append(point)
    return dict(sorted(points.items()))


def open_plugin(points: Sequence[metadata.EntryPoint], problem: Callable[[Any], str]) -> Any:
    """Import what the entry points of one name give; a `Broken` where it cannot be used.

    `problem` says why a value is not what the group wants, or nothing.
    """
    first = points[0]
    packages = tuple(sorted({package_of(point) for point in points}))
    if len(points) > 1:
        reason = f"{' and '.join(packages)} both give this name; uninstall one of them"
        return Broken(first.group, first.name, packages, reason)
    try:
        value = first.load()
    except Exception as error:  # foreign code: whatever it raises is reported, and breaks nothing else
        reason = f"{first.value} cannot be imported: {type(error).__name__}: {error}"
        return Broken(first.group, first.name, packages, reason)
    reason = problem(value)
    return Broken(first.group, first.name, packages, f"{first.value}: {reason}") if reason else value


def package_of(point: metadata.EntryPoint) -> str:
    """The distribution that an entry point comes from, with its version."""
    return "unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
