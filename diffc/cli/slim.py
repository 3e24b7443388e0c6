"""`diffc slim`: a copy of an artifact with what a deployment needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc slim build/fp8 -o deploy/fp8", "diffc slim build/fp8 --target trt-rtx --sm 89 -o deploy/fp8-sm89"
)


def slim_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET", help="A runtime target whose files to keep; repeatable.", show_default="all"
        ),
    ] = None,
    sm: Annotated[
        list[int] | None,
        typer.Option(metavar="SM", help="Keep engines for this GPU; repeatable.", show_default="all"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact at -o.")] = False,
) -> None:
    """Copy what a deployment needs of an artifact: no calibration, no validation, the engines asked for."""
    from diffc.cli.tables import megabytes
    from diffc.commands.slim import SlimRequest, slim

    request = SlimRequest(
        artifact.expanduser().absolute(),
        output.expanduser().absolute(),
        tuple(target or ()),
        tuple(sm or ()),
        force,
    )
    made = slim(request)
    sizes = {name: e["bytes"] for name, e in made.manifest["files"].items() if name not in made.missing}
    for name, size in sizes.items():
        terminal.line(f"  {name:32} {megabytes(size)}")
    terminal.line(f"Left out: {len(made.missing)} files. The copy is {made.folder}")
    terminal.result({"folder": str(made.folder), "files": sizes, "left_out": list(made.missing)})
