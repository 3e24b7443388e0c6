"""Charts are SVG that a page can hold: colours of the page, text that is text, and nothing of a name that acts."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from diffc.report import charts
from diffc.report.points import Point, distinct, pareto
from tests.report.made import HOSTILE

_TRUE = np.eye(3, dtype=bool)
EACH = {
    "bars": lambda name: charts.bars([(name, 2.0), ("b", 1.0)], "s", name),
    "front": lambda name: charts.front([Point(name, 1, 2, name), Point("b", 2, 1)], "x", "y", name),
    "line": lambda name: charts.line_of([3, 1], ["before", name], "nodes", name),
    "ranges": lambda name: charts.ranges([(name, 1e-3, 2e-2)], "scale", name),
    "heat": lambda name: charts.heat(np.array([[1.0, np.inf], [2, 3]]), [name, "b"], "step", "dB", name),
    "grid": lambda name: charts.grid(_TRUE, [name, "b", "c"], "step", name),
}


@pytest.mark.parametrize("kind", EACH)
def test_a_chart_is_whole_xml_in_the_colours_of_the_page(kind: str) -> None:
    svg = EACH[kind](HOSTILE)
    root = ElementTree.fromstring(svg)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "script" not in tags
    assert tags <= {
        "svg",
        "defs",
        "style",
        "g",
        "path",
        "use",
        "text",
        "clipPath",
        "rect",
        "image",
        "title",
        "tspan",
    }
    assert root.get("aria-label", "").startswith("<script>")
    assert "var(--ink)" in svg
    assert not [color for color in (charts.INK, charts.MUTED, *charts.SERIES) if color in svg]
    assert not re.search(r"\son\w+=", re.sub(r'aria-label="[^"]*"', "", svg.replace("onerror", "")))


def test_no_two_charts_share_a_name_that_means_different_things() -> None:
    first, second = (charts.bars([("a", n)], "s", "t") for n in (1.0, 2.0))
    for svg in (first, second):
        for name in re.findall(r' id="([^"]+)"', svg):
            assert f"#{name}" in svg, "a name that nothing uses"


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["m-fp8-sm89", "m-none-sm89"], ["fp8", "none"]),
        (["m-fp8", "m-fp8-x"], ["m-fp8", "m-fp8-x"]),
        (["a-x", "b-x", "b-y"], ["a-x", "b-x", "b-y"]),
        (["same", "same"], ["same", "same"]),
        (["one"], ["one"]),
    ],
)
def test_labels_say_what_differs(labels: list[str], told: list[str]) -> None:
    assert distinct(labels) == told


def test_the_front_is_what_nothing_beats() -> None:
    points = [Point(n, x, y) for n, x, y in (("a", 1, 9), ("b", 2, 5), ("c", 3, 7), ("d", 2, 6), ("e", 4, 1))]
    assert [p.label for p in pareto(points)] == ["a", "b", "e"]
    assert [p.label for p in pareto(points, high=True)] == ["a"]
