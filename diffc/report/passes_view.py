"""What the page shows of the passes: nodes before and after, what fired, and where and why a pass declined."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from diffc.report import charts
from diffc.report.subject import Subject

NODES = 100
"""Nodes of a refusal that a page shows."""
View = dict[str, Any]
_QUOTED = re.compile(r"'[^']*'")


def passes_view(subject: Subject) -> View:
    """Rows and charts of all passes, and their refusals; the manifest's short account where there is no other."""
    passes = subject.passes
    if not passes:
        short = [(p["name"], p["changed"], p["check"]) for p in subject.manifest.get("passes", ())]
        return {"passes": (), "pass_rows": short}
    rows: list[tuple[Any, ...]] = [
        (
            entry["name"],
            entry["graph"] or "all",
            entry["changed"],
            _change(entry["nodes_before"], entry["nodes_after"]),
            sum(len(refused["nodes"]) for refused in entry["refused"]),
            entry["check"],
        )
        for entry in passes
    ]
    return {
        "passes": passes,
        "pass_rows": rows,
        "pass_charts": list(_node_charts(passes)),
        "notes": [(entry["name"], entry["notes"]) for entry in passes if entry["notes"]],
        "refusals": [refusal for entry in passes for refusal in _refusals(entry)],
    }


def _refusals(entry: Mapping[str, Any]) -> Iterator[View]:
    """The refusals of a pass; those whose reasons differ only in what they quote are one."""
    alike: dict[str, list[tuple[str, str]]] = {}
    for refused in entry["refused"]:
        places = alike.setdefault(_QUOTED.sub("…", refused["reason"]), [])
        places += [(node, refused["reason"]) for node in refused["nodes"]]
    for reason, places in alike.items():
        yield {
            "name": entry["name"],
            "graph": entry["graph"],
            "reason": reason,
            "count": len(places),
            "places": [(node, "" if why == reason else why) for node, why in places[:NODES]],
            "more": max(0, len(places) - NODES),
        }


def _change(before: int, after: int) -> str:
    return str(after) if before == after else f"{before} → {after}"


def _node_charts(passes: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """Nodes after each pass that changed something, a chart for every graph."""
    for graph in dict.fromkeys(entry["graph"] for entry in passes):
        mine = [entry for entry in passes if entry["graph"] == graph]
        fired = [entry for entry in mine if entry["changed"]]
        if fired:
            values = [mine[0]["nodes_before"], *(entry["nodes_after"] for entry in fired)]
            names = ["before", *(entry["name"].partition("{")[0] for entry in fired)]
            title = f"Nodes after each pass that fired, {graph or 'all targets'}"
            yield charts.line_of(values, names, f"nodes ({graph or 'all targets'})", title)
