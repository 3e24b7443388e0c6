"""`diffc cache`: the plans that are known by name, and what one means for a model."""

from __future__ import annotations

import shlex
from pathlib import Path
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
    from diffc.cli.terminal import Terminal
    from diffc.models.registry import FAMILIES

    table = Table("plan", "for", "what is used again")
    for name, preset in PRESETS.items():
        arguments = ",".join(f"{key}={value:g}" for key, value in preset.defaults.items())
        suited = ", ".join(family.name for family in FAMILIES.values() if name in family.cache_plans)
        table.add_row(f"{name}:{arguments}" if arguments else name, suited, preset.summary)
    Terminal().console.print(table)


@cache_app.command("show")
def show_command(
    model: Annotated[str, typer.Argument(help="A pipeline or backbone folder, or an embedded model.")],
    plan: Annotated[str, typer.Argument(help="A plan of `diffc cache list`, or a .json or .yaml file.")],
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 20,
) -> None:
    """Say which blocks a plan uses again in which steps, and how many models a compile makes of it."""
    from diffc.cache.resolve import spell
    from diffc.cli.terminal import Terminal
    from diffc.compile.cached.stages import resolve_for
    from diffc.models.sources.backbone import FakeBackbone
    from diffc.models.sources.locate import locate
    from diffc.terminal_text import styled

    console = Terminal().console
    found = resolve_for(FakeBackbone(locate(model)), plan)
    for number, group in enumerate(found.groups):
        marks = "".join("." if number in reused else "#" for reused in found.schedule(steps))
        console.print(styled(f"{marks}  the {group.keep} of {spell(group.blocks)}"), soft_wrap=True)
    for note in found.notes:
        console.print(styled(note), soft_wrap=True)
    console.print(f"# computed, . used again; {1 + len(found.reuse_sets())} models")


@cache_app.command("search")
def search_command(
    model: Annotated[str, typer.Argument(help="A pipeline folder, or an embedded model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan to write, a .json file.")],
    speedup: Annotated[
        float, typer.Option(help="How many times as fast the backbone is to be.", min=1.01)
    ] = 1.5,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=3)] = 20,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to measure with; repeatable.")] = None,
    trials: Annotated[int, typer.Option(help="How many of the promising plans to run.", min=1)] = 6,
    size: Annotated[
        int | None, typer.Option(help="Pixels of the images. [default: the model's]", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=2**32 - 1)] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw change by block and step, and the speed/quality curve.")
    ] = None,
) -> None:
    """Measure how much blocks change from step to step in torch, and write the plan of best quality."""
    from rich.table import Table

    from diffc.cli.terminal import Terminal
    from diffc.commands.bench.output import check_folder, check_plot
    from diffc.commands.cache_search.measure import SearchRequest
    from diffc.commands.cache_search.pipeline import DEFAULT_PROMPTS, load_for_search
    from diffc.commands.cache_search.plot import draw
    from diffc.commands.cache_search.search import search
    from diffc.terminal_text import cell, styled

    check_plot(plot)
    for path in (output, plot):
        check_folder(path)
    ui = Terminal()
    pipe = load_for_search(model, ui)
    asked = SearchRequest(tuple(prompt or DEFAULT_PROMPTS), steps, speedup, trials, seed, size)
    with ui.stage("measure and try plans") as update:
        found = search(pipe, asked, update)
    table = Table("plan", "speed-up", "PSNR of the latents")
    for tried in found.tried:
        mark = " *" if tried is found.best else ""
        table.add_row(cell(tried.plan.name + mark), f"{tried.speedup:.2f}", f"{tried.psnr or 0:.1f} dB")
    ui.console.print(table)
    found.save(output)
    if plot is not None:
        draw(found, plot)
    command = shlex.join(("diffc", "compile", model, "--cache-plan", str(output)))
    ui.console.print(styled(f"Wrote {output}: {command}"), soft_wrap=True)
