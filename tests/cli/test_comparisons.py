"""The table of a comparison: what a newcomer reads of limits and verdicts."""

from __future__ import annotations

import io

from diffc.cli.comparisons import compared
from diffc.cli.terminal import Terminal
from diffc.models.spec import Shape
from diffc.terminal_text import Screen
from diffc.validate.compare import OutputComparison
from diffc.validate.reports import ShapeReport

SHAPE = Shape(1, 64, 96, 24)


def report(error: float, limit: float, floor: float | None = None) -> ShapeReport:
    row = OutputComparison("sample", error <= limit, limit, error, 0.1, 0.99, (1,))
    return ShapeReport(SHAPE, "float16", [row], {}, {}, {}, floor=floor)


def shown(*reports: ShapeReport) -> str:
    terminal, file = Terminal(), io.StringIO()
    terminal.console = Screen(file=file, width=80)
    compared(reports, terminal, "ort against torch")
    return file.getvalue()


def test_a_difference_within_its_limit_is_ok() -> None:
    text = shown(report(4e-3, 2e-2))
    assert "4.0e-03 ok" in text
    assert "limit 2e-02" in text
    assert "within all limits" in text


def test_a_difference_that_the_type_itself_makes_is_ok_and_says_why() -> None:
    text = " ".join(shown(report(6.6e-2, 2e-2, floor=6.7e-2)).split())
    assert "6.6e-02 ok (*)" in text
    assert "roundings of float16 alone move the reference by 6.7e-02 here" in text
    assert "no more than the type itself changes" in text
    assert "FAILED" not in text


def test_a_difference_that_nothing_explains_failed() -> None:
    text = shown(report(6.6e-2, 2e-2, floor=1e-4))
    assert "6.6e-02 FAILED" in text
    assert "within all limits" not in text
