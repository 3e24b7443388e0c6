"""Charts as SVG inside the page, by matplotlib: no script, text that stays text, and the colours of the page.

matplotlib draws in stand-in colours, which become the variables of the page's style sheet: so a chart is dark where
the page is dark. Names come from files: they are never read as mathematics.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

from diffc.report.points import Point, distinct, pareto
from diffc.terminal_text import line

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#0a0001", "#0a0002", "#0a0003"
SERIES = tuple(f"#0a00{number:02x}" for number in range(0x10, 0x16))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "rule"} | {
    color: f"c{number}" for number, color in enumerate(SERIES, 1)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 4.8
"""Inches of a chart: its 9 points of text can be read on a telephone, where it has 360 pixels."""
_LABEL = 30


def bars(rows: Sequence[tuple[str, float]], unit: str, title: str) -> Markup:
    """Horizontal bars with their values, in the order of `rows`."""

    def draw(axes: Axes) -> None:
        names, values = [_short(name, end=True) for name, _ in rows], [value for _, value in rows]
        drawn = axes.barh(range(len(rows)), values, color=SERIES[0])
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.bar_label(drawn, [f"{value:,.3g}" for value in values], padding=3)
        axes.margins(x=0.12)
        axes.set_xlabel(unit)

    return _chart(draw, title, 0.9 + 0.24 * len(rows))


def front(points: Sequence[Point], x: str, y: str, title: str, *, high: bool = False) -> Markup:
    """Points, with a line along those that no other point beats in both. `high`: a large `y` is good."""

    def draw(axes: Axes) -> None:
        groups = list(dict.fromkeys(point.group for point in points))
        for number, group in enumerate(groups):
            mine = [point for point in points if point.group == group]
            color = SERIES[number % len(SERIES)]
            axes.scatter([p.x for p in mine], [p.y for p in mine], color=color, zorder=3, label=_short(group))
        best = pareto(points, high=high)
        axes.step(
            [p.x for p in best], [p.y for p in best], color=MUTED, where="post", zorder=2, linestyle="--"
        )
        middle = (min(p.x for p in points) + max(p.x for p in points)) / 2
        for point, label in zip(points, distinct([p.label for p in points]), strict=True):
            side, offset = ("right", -5) if point.x > middle else ("left", 5)
            place = (point.x, point.y)
            axes.annotate(_short(label, 24), place, (offset, 4), textcoords="offset points", ha=side)
        axes.margins(0.2)
        axes.grid(zorder=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(groups) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2)

    return _chart(draw, title, 4.2)


def line_of(values: Sequence[float], names: Sequence[str], y: str, title: str) -> Markup:
    """One value after each step, as stairs."""

    def draw(axes: Axes) -> None:
        axes.step(range(len(values)), values, where="post", color=SERIES[0])
        axes.plot(range(len(values)), values, ".", color=SERIES[0])
        axes.set_ylim(bottom=0)
        axes.set_xticks(range(len(values)), [_short(name, 24) for name in names], rotation=60, ha="right")
        axes.set_ylabel(y)
        axes.grid(axis="y")

    return _chart(draw, title, 3.8)


def ranges(rows: Sequence[tuple[str, float, float]], y: str, title: str) -> Markup:
    """From the smallest to the largest value of each row, on a logarithmic axis."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))
        axes.vlines(places, [row[1] for row in rows], [row[2] for row in rows], color=SERIES[0], linewidth=2)
        axes.plot(places, [row[1] for row in rows], "_", color=SERIES[0])
        axes.plot(places, [row[2] for row in rows], "_", color=SERIES[0])
        _logarithmic(axes)
        axes.set_xlabel("layer, in the order of the graph")
        axes.set_ylabel(y)
        axes.grid(axis="y")

    return _chart(draw, title, 3)


def heat(
    values: npt.NDArray[np.float64],
    rows: Sequence[str],
    x: str,
    label: str,
    title: str,
    *,
    reverse: bool = False,
) -> Markup:
    """Values [rows, columns] as colours; what is not finite stays empty. `reverse`: dark is much."""

    def draw(axes: Axes) -> None:
        import matplotlib

        colors = matplotlib.colormaps["viridis_r" if reverse else "viridis"]
        image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap=colors, interpolation="nearest")
        bar = axes.figure.colorbar(image, ax=axes, label=label, shrink=min(1.0, 12 / max(len(rows), 12)))
        bar.outline.set_visible(False)
        _rows(axes, rows)
        axes.set_xlabel(x)
        axes.locator_params(axis="x", integer=True)

    return _chart(draw, title, 1 + min(0.17 * len(rows), 14))


def grid(cells: npt.NDArray[np.bool_], rows: Sequence[str], x: str, title: str) -> Markup:
    """Squares [rows, columns], filled where `cells` is true."""

    def draw(axes: Axes) -> None:
        edges = np.arange(cells.shape[1] + 1) - 0.5, np.arange(cells.shape[0] + 1) - 0.5
        for here, color in ((cells, SERIES[1]), (~cells, SERIES[0])):
            for row, column in zip(*np.nonzero(here), strict=True):
                place = (edges[0][column] + 0.06, edges[1][row] + 0.06)
                axes.add_patch(_square(place, color))
        axes.set_xlim(edges[0][0], edges[0][-1])
        axes.set_ylim(edges[1][-1], edges[1][0])
        _rows(axes, rows)
        axes.set_xlabel(x)
        axes.locator_params(axis="x", integer=True)

    return _chart(draw, title, 0.9 + min(0.2 * len(rows), 14))


def _square(place: tuple[float, float], color: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(place, 0.88, 0.88, color=color, linewidth=0)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose numbers are plain text: 0.002, 1e-05."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")


def _rows(axes: Axes, names: Sequence[str]) -> None:
    every = max(1, -(-len(names) // 80))
    axes.set_yticks(range(0, len(names), every), [_short(name) for name in names[::every]], fontsize=7)


def _short(name: str, limit: int = _LABEL, *, end: bool = False) -> str:
    """The last letters of a long name, which tell modules apart; with `end` its first ones."""
    text = line(name)
    if len(text) <= limit:
        return text
    return text[: limit - 1] + "…" if end else "…" + text[1 - limit :]


def _chart(draw: Callable[[Axes], None], title: str, height: float) -> Markup:
    """The SVG of one chart of `height` inches."""
    with _figure(height) as figure:
        draw(figure.subplots())
        file = StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return page_svg(file.getvalue(), title)


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font used for measuring lacks
        yield Figure(figsize=(WIDTH, height), layout="constrained")


def page_svg(text: str, title: str) -> Markup:
    """The <svg> of matplotlib's document: colours of the page, a size that fits it, and no name that nothing uses."""
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in used else "", svg)
    for color, name in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{name})")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2] if "pt" in svg else ("", "")
    head = f'<svg role="img" aria-label="{escape(line(title))}" class="chart"'
    svg = svg.replace("<svg", head, 1)
    svg = re.sub(rf' (width|height)="({width}|{height})pt"', "", svg, count=2)
    return Markup(re.sub(r"\s*\n\s*", "\n", svg))
