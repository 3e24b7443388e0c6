"""Tables of what was compared: outputs with their limits, and modules that are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from diffc.cli.listings import plain_table
from diffc.terminal_text import cell, styled

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal
    from diffc.validate.modules import ModuleReport
    from diffc.validate.reports import ShapeReport

_WRONG, _NODES = 10, 6
"""Modules that are wrong, and nodes of each, that a table shows."""


def compared(reports: Sequence[ShapeReport], terminal: Terminal, title: str) -> None:
    """One row for every output at every shape, one column for every arithmetic: the difference and a verdict."""
    kinds = list(dict.fromkeys(report.arithmetic for report in reports))
    limits = {r.arithmetic: row.tolerance for r in reports for row in r.rows}
    headers = (f"{kind.replace(', ', ',' + chr(10))}\n(limit {limits.get(kind, 0):.0e})" for kind in kinds)
    table = plain_table("at", *headers, title=f"{title}: relative L2 error of the output")
    rows: dict[str, dict[str, Any]] = {}
    for report in reports:
        for row in report.rows:
            where = f"{report.model}, {report.shape}, seed {report.seed}"
            where += f", {row.name}" if len(report.rows) > 1 else ""
            rows.setdefault(where, {})[report.arithmetic] = _verdict(report, row)
    for where, cells in rows.items():
        table.add_row(cell(where), *(cells.get(kind, "") for kind in kinds))
    terminal.print(table)
    for report in (r for r in reports if r.chaotic):
        terminal.line(
            f"(*) ok: roundings of {report.arithmetic} alone move the reference by {report.floor:.1e} here,"
            " so the two differ by no more than the type itself changes"
        )
    if all(report.passed or report.chaotic for report in reports):
        terminal.line(("The compiled model is within all limits", "green"))


def _verdict(report: ShapeReport, row: Any) -> Any:
    error = "-" if row.rel_l2 is None else f"{row.rel_l2:.1e}"
    if row.passed:
        return styled(error, (" ok", "green"))
    return styled(error, (" ok (*)", "green")) if report.chaotic else styled(error, (" FAILED", "red"))


def modules_compared(modules: Mapping[str, Sequence[ModuleReport]], terminal: Terminal) -> None:
    """The modules that are wrong, first one first, and how many were compared."""
    for model, found in modules.items():
        for report in found:
            title = f"{model}, {report.modules} modules in {report.arithmetic}, each by itself"
            if report.wrong:
                terminal.print(_wrong_modules(title, report))
            else:
                terminal.line(f"{title}: ", ("all within their limit", "green"))
            if report.by_chance:
                terminal.line(
                    f"    {report.by_chance} more differ by no more than roundings of their inputs do"
                )


def _wrong_modules(title: str, report: ModuleReport) -> Table:
    table = plain_table("module", "node", "operator", "rel. L2", "limit", "nodes since the cut", title=title)
    for wrong in report.wrong[:_WRONG]:
        figures = f"{wrong.error:.2e}", f"{wrong.limit:.0e}"
        more = f"\nand {len(wrong.nodes) - _NODES} more" if len(wrong.nodes) > _NODES else ""
        value = wrong.value
        nodes = "\n".join(wrong.nodes[:_NODES]) + more
        table.add_row(cell(value.module), cell(value.node), cell(value.op), *figures, cell(nodes))
    if len(report.wrong) > _WRONG:
        table.caption = f"and {len(report.wrong) - _WRONG} more"
    return table
