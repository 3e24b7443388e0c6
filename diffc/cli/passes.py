"""`diffc passes`: the passes, their options and what they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples("diffc passes --short", "diffc passes fold-constants")


def passes_command(
    terminal: Terminal,
    name: Annotated[
        str | None,
        typer.Argument(
            help="The pass to describe.",
            show_default="all",
            autocompletion=completed(choices.passes),
        ),
    ] = None,
    short: Annotated[bool, typer.Option("--short", help="One line a pass.")] = False,
) -> None:
    """List the passes, their options and what they do."""
    from diffc.cli.listings import list_passes
    from diffc.commands.optimize import known_passes

    list_passes(known_passes(name), terminal, short=short)
