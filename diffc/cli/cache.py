"""`diffc cache`: the plans that are known by name, and what one means for a model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import Command, Group, examples, shared_options
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

cache_app = typer.Typer(
    cls=Group,
    help="Cache diffusion: block outputs of one denoising step used again in later ones.",
    no_args_is_help=True,
)


@cache_app.command("list", cls=Command)
@shared_options
def list_command(terminal: Terminal) -> None:
    """List the cache plans that `diffc compile --cache-plan` knows by name, with their arguments."""
    from diffc.cli.listings import list_cache_plans

    list_cache_plans(terminal)


@cache_app.command("show", cls=Command, epilog=examples("diffc cache show digits-sdxl deepcache:every=2"))
@shared_options
def show_command(
    terminal: Terminal,
    model: Annotated[
        str,
        typer.Argument(
            help="A pipeline or backbone folder, or an embedded model.",
            autocompletion=completed(choices.models),
        ),
    ],
    plan: Annotated[
        str,
        typer.Argument(
            metavar="PLAN",
            help="A plan of `diffc cache list`, or a .json or .yaml file.",
            autocompletion=completed(choices.cache_plans),
        ),
    ],
    steps: Annotated[
        int, typer.Option(metavar="COUNT", help="Denoising steps.", min=1, max=choices.MOST)
    ] = 20,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Say which blocks a plan uses again in which steps, and how many models a compile makes of it."""
    from diffc.cache.resolve import spell
    from diffc.compile.cached.stages import resolve_for
    from diffc.models.sources.backbone import FakeBackbone
    from diffc.models.sources.locate import locate
    from diffc.models.sources.source import HubOptions

    found = resolve_for(
        FakeBackbone(locate(model, HubOptions(revision, variant, subfolder, token, cache_dir))), plan
    )
    groups = []
    for number, group in enumerate(found.groups):
        reused = [number in step for step in found.schedule(steps)]
        terminal.line(
            "".join(".#"[not again] for again in reused), f"  the {group.keep} of {spell(group.blocks)}"
        )
        groups.append({"blocks": list(group.blocks), "keep": group.keep, "reused": reused})
    for note in found.notes:
        terminal.line(note)
    models = 1 + len(found.reuse_sets())
    terminal.line(f"# computed, . used again; {models} models")
    terminal.result({"groups": groups, "notes": list(found.notes), "models": models})


@cache_app.command(
    "search", cls=Command, epilog=examples("diffc cache search PIPELINE --speedup 1.5 -o plan.json")
)
@shared_options
def search_command(
    terminal: Terminal,
    model: Annotated[
        str,
        typer.Argument(
            help="A pipeline folder, or an embedded model.",
            autocompletion=completed(choices.models),
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The plan to write, a .json file.")
    ],
    speedup: Annotated[
        float, typer.Option(metavar="TIMES", help="How many times as fast the backbone is to be.", min=1.01)
    ] = 1.5,
    steps: Annotated[
        int, typer.Option(metavar="COUNT", help="Denoising steps.", min=3, max=choices.MOST)
    ] = 20,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="A prompt to measure with; repeatable.", show_default="three of diffc's own"
        ),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="How many of the promising plans to run.", min=1, max=choices.MOST
        ),
    ] = 6,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Height and width of the images.",
            show_default="the model's",
            min=1,
            max=choices.MOST,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the noise.", min=0, max=2**32 - 1)] = 0,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=WEIGHT]", help="A LoRA in the weights, as for `diffc compile`; repeatable."
        ),
    ] = None,
    lora_partial: Annotated[
        bool, typer.Option("--lora-partial", help="Leave out keys of a LoRA that fit no layer.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw change by block and step, and the speed/quality curve."),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Measure how much blocks change from step to step in torch, and write the plan of best quality."""
    from diffc.cli.listings import plans_tried
    from diffc.commands.bench.output import check_folder, check_plot
    from diffc.commands.cache_search.measure import SearchRequest
    from diffc.commands.cache_search.pipeline import DEFAULT_PROMPTS, load_for_search
    from diffc.commands.cache_search.plot import draw
    from diffc.commands.cache_search.search import search
    from diffc.models.sources.lora_files import parse_lora
    from diffc.models.sources.source import HubOptions

    check_plot(plot)
    for path in (output, plot):
        check_folder(path)
    hub = HubOptions(revision, variant, subfolder, token, cache_dir)
    loras = tuple(map(parse_lora, lora or ()))
    pipe = load_for_search(model, terminal.ui, hub, loras, partial=lora_partial)
    asked = SearchRequest(tuple(prompt or DEFAULT_PROMPTS), steps, speedup, trials, seed, size)
    with terminal.ui.stage("measure and try plans") as update:
        found = search(pipe, asked, update)
    plans_tried(found, terminal)
    found.save(output)
    if plot is not None:
        draw(found, plot)
    options = [part for text in lora or () for part in ("--lora", text)]
    command = shlex.join(("diffc", "compile", model, *options, "--cache-plan", str(output)))
    terminal.line(f"Wrote {output}: {command}")
