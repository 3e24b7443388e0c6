"""What two artifacts differ in: settings of their manifests, figures, and the formats of their layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffc.report import words
from diffc.report.subject import Subject

_LEFT_OUT = ("files", "validation", "passes", "engines", "cache", "inputs", "outputs", "left_out")
"""Entries of a manifest that a table of their own shows, or that say nothing to a reader."""


def differences(one: Subject, other: Subject) -> dict[str, Any]:
    """Rows of the three tables, and how many layers there are in all."""
    mine, theirs = dict(_flat(_settings(one))), dict(_flat(_settings(other)))
    names = dict.fromkeys([*mine, *theirs])
    settings = [(n, mine.get(n, "-"), theirs.get(n, "-")) for n in names if mine.get(n) != theirs.get(n)]
    first, second = ({layer.path: layer.format for layer in s.layers} for s in (one, other))
    paths = list(dict.fromkeys([*first, *second]))
    layers = [(p, first.get(p, "-"), second.get(p, "-")) for p in paths if first.get(p) != second.get(p)]
    return {
        "settings": settings,
        "figures": list(_figures(one, other)),
        "layers": layers,
        "all_layers": len(paths),
    }


def _settings(subject: Subject) -> dict[str, Any]:
    """The manifest without tables, and the plan of its cache by name."""
    kept = {name: value for name, value in subject.manifest.items() if name not in _LEFT_OUT}
    cache = subject.manifest.get("cache")
    return kept | ({"cache": {"plan": cache["plan"], "layout": cache.get("layout")}} if cache else {})


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", str(value)


def _figures(one: Subject, other: Subject) -> Iterator[tuple[str, str, str, str]]:
    for kind, here in one.sizes.items():
        there = other.sizes[kind]
        yield kind, words.size(here), words.size(there), f"{there / here - 1:+.0%}" if here else "-"
    for kind in dict.fromkeys([*one.errors, *other.errors]):
        a, b = one.errors.get(kind), other.errors.get(kind)
        yield f"worst error, {kind}", words.error(a), words.error(b), f"{b / a:.2g} x" if a and b else "-"
    yield "nodes after the passes that all targets share", _nodes(one), _nodes(other), ""
    runs = [subject.run["seconds"] if subject.run else None for subject in (one, other)]
    yield "compile", words.seconds(runs[0]), words.seconds(runs[1]), ""


def _nodes(subject: Subject) -> str:
    shared = [entry for entry in subject.passes if not entry["graph"]]
    return str(shared[-1]["nodes_after"]) if shared else "-"
