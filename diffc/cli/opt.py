"""`diffc opt`: passes over an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def opt_command(
    model: Annotated[Path, typer.Argument(help="An .onnx file, its weights beside it.")],
    passes: Annotated[
        str, typer.Option("--passes", "-p", help="'name{option=value},name'; see `diffc passes`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    check: Annotated[
        str, typer.Option(help="numeric (before = after in ONNX Runtime) or structure.")
    ] = "structure",
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Run passes over an ONNX model."""
    from diffc.cli.tables import optimized
    from diffc.cli.terminal import Terminal
    from diffc.commands.optimize import optimize

    ui = Terminal()
    optimized(optimize(model, passes, output, check=check, dump=dump, force=force, ui=ui), output, ui.console)
