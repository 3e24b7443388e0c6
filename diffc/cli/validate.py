"""`diffc validate`: run a finished artifact again and hold it against its torch model, or another graph."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def validate_command(
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    target: Annotated[
        str,
        typer.Option(
            help="ort (the CPU, exactly what the graph says), or what diffc.load runs: ort-cuda, trt-rtx ..."
        ),
    ] = "ort",
    against: Annotated[
        str | None,
        typer.Option(
            help="torch, ort (its own graph in float32), an artifact, or an .onnx file. [default: torch]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the torch model lies, if not where the compile found it.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Such as batch=2,height=128,width=64,text=40; repeatable. [default: two]"),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of the inputs; repeatable.", min=0, max=2**32 - 1)
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative L2 error in the place of the limits of format and type.")
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the modules that are off, each by itself.")
    ] = False,
    script: Annotated[
        Path | None, typer.Option(help="Write what `polygraphy run` repeats this with to this folder.")
    ] = None,
) -> None:
    """Run an artifact again and hold it against torch, or against another graph. Exit code 3: it differs."""
    from diffc.cli.tables import bisected, compared
    from diffc.cli.terminal import Terminal
    from diffc.commands.validate import ValidateRequest, validate_artifact
    from diffc.terminal_text import styled

    request = ValidateRequest(
        artifact.expanduser().absolute(),
        target,
        against,
        model,
        tuple(shape or ()),
        tuple(seed or ()),
        tolerance,
    )
    ui = Terminal()
    result = validate_artifact(request, ui, bisect=bisect, script=script)
    compared(result.reports, ui.console, f"{target} against {result.against}")
    if bisect:
        bisected(result.modules, ui.console)
    if script is not None:
        command = shlex.join(("sh", str(script / "run.sh")))
        ui.console.print(styled(f"Repeat it with: {command}"), soft_wrap=True)
    result.require_match()
