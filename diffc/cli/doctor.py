"""`diffc doctor`: what works on this machine; with --run, whether an artifact does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc doctor", "diffc doctor --json -", "diffc doctor --run build/fp8 --report fp8-report.json"
)


def doctor_command(
    terminal: Terminal,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTIFACT",
            help="Run every engine and graph of this artifact once here, compare them, and write a report.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where the report of --run goes, to be sent to whoever asked for it.",
            show_default="diffc-report-ARTIFACT.json here",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="With --run: this target alone.", show_default="all"),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="With --run: runs after the first, to be timed.", min=0, max=choices.MOST
        ),
    ] = 5,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="With --run: for each engine or graph.", min=1)
    ] = 1800.0,
) -> None:
    """Say what works on this machine, why the rest does not, and what fixes it. Exit code 1: diffc cannot compile.

    With --run ARTIFACT: exit code 3 when an engine crashes or differs, 1 when none of its engines can be run here.
    """
    if run is not None:
        _run(terminal, run, report, target, repeat, timeout)
        return
    from diffc.cli.listings import examined
    from diffc.commands.doctor import examine, require_able
    from diffc.errors import UsageError

    if report is not None or target is not None:
        raise UsageError("--report and --target belong to --run", fix="name the artifact: --run ARTIFACT")
    findings = examine(terminal.ui)
    examined(findings, terminal)
    require_able(findings)


def _run(
    terminal: Terminal, run: Path, report: Path | None, target: str | None, repeat: int, timeout: float
) -> None:
    from diffc.commands.doctor_run.report import lines
    from diffc.commands.doctor_run.run import DoctorRequest, examine_artifact

    folder = run.expanduser().absolute()
    place = (report or Path(f"diffc-report-{folder.name}.json")).expanduser()
    found = examine_artifact(DoctorRequest(folder, place, target, repeat, timeout), terminal.ui)
    for line in lines(found):
        terminal.line(line)
    terminal.result(found.to_json())
    terminal.line(f"Wrote {place}: send this file back")
    found.require_right()
