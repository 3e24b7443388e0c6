"""`diffc import`: an export of ModelOpt's scripts in the canonical form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples("diffc import backbone.onnx -o canonical.onnx")


def import_command(
    terminal: Terminal,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="An .onnx file that ModelOpt exported, with its weights beside it."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .onnx file to write.")],
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Bring an ONNX model of ModelOpt's scripts to the canonical form, with compressed weights."""
    from diffc.cli.tables import optimized
    from diffc.compile.import_onnx import import_file

    optimized(import_file(model, output, dump=dump, force=force, ui=terminal.ui), output, terminal)
