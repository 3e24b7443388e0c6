"""`diffc inspect`: what an artifact or a model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc inspect build/digits",
    "diffc inspect PIPELINE",
    "diffc inspect model.safetensors",
    "diffc inspect build/digits --json -",
)


def inspect_command(
    terminal: Terminal,
    what: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|MODEL",
            help="What `diffc compile` wrote, a pipeline or backbone folder, a file, OWNER/NAME of the hub, or a name.",
            autocompletion=completed(choices.models),
        ),
    ],
    passes: Annotated[bool, typer.Option("--passes", help="What every pass did, too.")] = False,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Say what an artifact holds (shapes, formats, passes, sizes, engines, checks), or what a model is."""
    from diffc.cli.inspection import inspected
    from diffc.commands.inspect import inspect
    from diffc.models.sources.source import HubOptions

    hub = HubOptions(revision, variant, subfolder, token, cache_dir)
    inspected(inspect(what, hub), terminal, passes=passes)
