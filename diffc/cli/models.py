"""`diffc models`: the models that diffc knows by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

models_app = typer.Typer(
    help="The models that diffc knows by name: list them, or write one as a folder.", no_args_is_help=True
)


@models_app.command("list")
def models_list() -> None:
    """List the embedded models, and the real ones whose configurations diffc has."""
    from diffc.cli.tables import list_models
    from diffc.cli.terminal import Terminal

    list_models(Terminal().console)


@models_app.command("make")
def models_make(
    name: Annotated[str, typer.Argument(help="A model of `diffc models list`.")],
    directory: Annotated[Path, typer.Argument(help="The folder to write.")],
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="A real model's backbone, in full size, with random weights."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights.", min=0)] = 0,
) -> None:
    """Write an embedded model as a diffusers pipeline folder, or a real one's backbone with random weights."""
    from diffc.cli.terminal import Terminal
    from diffc.models.embedded.real import make
    from diffc.terminal_text import line

    place, ui = directory.expanduser().absolute(), Terminal()
    made = make(name, place, random_weights=random_weights, seed=seed, ui=ui)
    typer.echo(line(f"{name} is in {made}"))
