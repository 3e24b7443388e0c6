"""`diffc opt`: passes over an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc opt in.onnx -p fold-constants,remove-unused -o out.onnx",
    "diffc opt in.onnx -p 'rewrite-opset{to=23}' -o out.onnx --check numeric",
)


def opt_command(
    terminal: Terminal,
    model: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx file, with its weights beside it.")],
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            metavar="PASSES",
            help="'name{option=value},name'; see `diffc passes`.",
            autocompletion=completed(choices.passes),
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .onnx file to write.")],
    check: Annotated[
        str,
        typer.Option(
            metavar="CHECK",
            help="structure, or numeric: ONNX Runtime gives the same before and after each pass.",
            autocompletion=completed(lambda: choices.CHECKS),
        ),
    ] = "structure",
    dump: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Run passes over an ONNX model."""
    from diffc.cli.tables import optimized
    from diffc.commands.optimize import optimize

    result = optimize(model, passes, output, check=check, dump=dump, force=force, ui=terminal.ui)
    optimized(result, output, terminal)
