"""`diffc models`: the models that diffc knows by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import Command, Group, examples, shared_options

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

models_app = typer.Typer(
    cls=Group,
    help="List the models that diffc knows by name, or write one as a folder.",
    no_args_is_help=True,
)


@models_app.command("list", cls=Command)
@shared_options
def list_command(terminal: Terminal) -> None:
    """List the embedded models, and the real ones whose configurations diffc has."""
    from diffc.cli.listings import list_models

    list_models(terminal)


@models_app.command("families", cls=Command)
@shared_options
def families_command(terminal: Terminal) -> None:
    """List the classes of backbones: those with a family file, and those read off their pipeline."""
    from diffc.cli.listings import list_families

    list_families(terminal)


@models_app.command("make", cls=Command, epilog=examples("diffc models make digits-sd3 models/digits"))
@shared_options
def make_command(
    terminal: Terminal,
    name: Annotated[
        str,
        typer.Argument(
            help="A model of `diffc models list`.",
            autocompletion=completed(choices.all_models),
        ),
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="A real model's backbone, in full size, with random weights."),
    ] = False,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of random weights.", min=0)] = 0,
) -> None:
    """Write an embedded model as a diffusers pipeline folder, or a real one's backbone with random weights."""
    from diffc.models.embedded.random_model import make

    place = directory.expanduser().absolute()
    made = make(name, place, random_weights=random_weights, seed=seed, ui=terminal.ui)
    terminal.line(f"{name} is in {made}")
    terminal.result({"name": name, "folder": str(made)})
