"""`diffc relora`: an artifact with other LoRAs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc relora build/fp8 --lora style.safetensors=0.8 -o build/fp8-style",
    "diffc relora build/fp8-style -o build/fp8",
)


def relora_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=WEIGHT]",
            help="A LoRA, as for `diffc compile`; repeatable.",
            show_default="none: the model without LoRAs",
        ),
    ] = None,
    lora_partial: Annotated[
        bool, typer.Option("--lora-partial", help="Leave out keys of a LoRA that fit no layer.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the diffusers model lies now.",
            show_default="where the compile found it",
        ),
    ] = None,
    skip_validation: Annotated[
        bool, typer.Option("--skip-validation", help="Do not compare the result with torch.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact at -o.")] = False,
) -> None:
    """Compile an artifact again with other LoRAs in its weights, without calibrating again."""
    from diffc.cli.tables import compiled
    from diffc.commands.relora import ReloraRequest, relora
    from diffc.models.sources.lora_files import parse_lora

    request = ReloraRequest(
        artifact.expanduser().absolute(),
        output.expanduser().absolute(),
        tuple(map(parse_lora, lora or ())),
        lora_partial,
        model,
        skip_validation,
        force,
    )
    started = time.perf_counter()
    result = relora(request, terminal.ui)
    compiled(result, time.perf_counter() - started, terminal)
