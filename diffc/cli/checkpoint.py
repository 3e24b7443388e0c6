"""`diffc checkpoint`: calibrations in the layouts of other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.choices import completed
from diffc.cli.command import Command, Group, examples, shared_options

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

checkpoint_app = typer.Typer(
    cls=Group, help="Write a calibration in the layout of another tool.", no_args_is_help=True
)
_NAMES = ("modelopt-hf", "diffusers", "mto", "comfyui")


@checkpoint_app.command(
    "export",
    cls=Command,
    epilog=examples(
        "diffc checkpoint export build/digits --layout modelopt-hf -o exports/digits",
        "diffc checkpoint export build/digits --layout comfyui -o exports/digits.safetensors",
    ),
)
@shared_options
def export_command(
    terminal: Terminal,
    what: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT|CHECKPOINT", help="An artifact, or the folder of a calibration."),
    ],
    layout: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="modelopt-hf (folder), diffusers (folder, 16 bits), mto (.pt) or comfyui (.safetensors).",
            autocompletion=completed(lambda: _NAMES),
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="Folder or file to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Where the model lies.", show_default="where the compile found it"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
) -> None:
    """Write codes and scales of a calibrated model as another tool reads them; says what a layout has no place for."""
    from diffc.commands.export.run import ExportRequest, export

    written = export(ExportRequest(what, layout, output, model, force))
    terminal.line(f"{written.layers} quantized layers in {output}")
    for reason, names in written.left_out.items():
        seen = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        terminal.line(f"  left out: {reason}: {seen}")
    terminal.result({"output": str(output), "layers": written.layers, "left_out": dict(written.left_out)})
