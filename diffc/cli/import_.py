"""`diffc import`: an export of ModelOpt's scripts in the canonical form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_command(
    model: Annotated[
        Path, typer.Argument(help="An .onnx file that ModelOpt exported, its weights beside it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Bring an ONNX model of ModelOpt's scripts to the canonical form, its weights compressed."""
    from diffc.cli.tables import optimized
    from diffc.cli.terminal import Terminal
    from diffc.compile.import_onnx import import_file

    ui = Terminal()
    optimized(import_file(model, output, dump=dump, force=force, ui=ui), output, ui.console)
