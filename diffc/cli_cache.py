"""`diffc cache`: the plans that are known by name, and what one means for a model."""

from __future__ import annotations

from typing import Annotated

import typer

cache_app = typer.Typer(
    help="Cache diffusion: block outputs of one denoising step used again in later ones.",
    no_args_is_help=True,
)


@cache_app.command("list")
def list_command() -> None:
    """List the cache plans that `diffc compile --cache-plan` knows by name, with their arguments."""
    from rich.table import Table

    from diffc.cache.presets import PRESETS
    from diffc.ui import Terminal

    table = Table("plan", "for", "what is used again")
    for name, preset in PRESETS.items():
        arguments = ",".join(f"{key}={value:g}" for key, value in preset.defaults.items())
        table.add_row(
            f"{name}:{arguments}" if arguments else name, ", ".join(preset.families), preset.summary
        )
    Terminal().console.print(table)


@cache_app.command("show")
def show_command(
    model: Annotated[str, typer.Argument(help="A pipeline or backbone folder, or an embedded model.")],
    plan: Annotated[str, typer.Argument(help="A plan of `diffc cache list`, or a .json or .yaml file.")],
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
) -> None:
    """Say which blocks a plan uses again in which steps, and how many models a compile makes of it."""
    from diffc.cache.compiling import resolve_for
    from diffc.cache.resolve import spell
    from diffc.models.locate import locate
    from diffc.ui import Terminal

    console = Terminal().console
    found = resolve_for(locate(model), plan)
    for number, group in enumerate(found.groups):
        marks = "".join("." if number in reused else "#" for reused in found.schedule(steps))
        console.print(f"{marks}  the {group.keep} of {spell(group.blocks)}", markup=False, soft_wrap=True)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"# computed, . used again; {1 + len(found.reuse_sets())} models")
