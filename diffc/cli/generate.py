"""`diffc generate`: paint with a compiled backbone, beside torch or other artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.command import examples
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc generate build/digits --prompt 'a handwritten seven' -o seven.png",
    "diffc generate build/fp8 --prompt 'a red fox' --compare torch --height 768 --width 1024 -o fox.png",
)


def generate_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to paint.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The PNG to write; a .gif or .webp shows the frames one after the other.",
        ),
    ],
    negative_prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What not to paint, for pipelines with guidance."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="torch, or another artifact, to paint beside it; repeatable."),
    ] = None,
    steps: Annotated[
        int, typer.Option(metavar="COUNT", help="Denoising steps.", min=1, max=choices.MOST)
    ] = 25,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="SCALE", help="Guidance scale.", show_default="the pipeline's", min=0),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="SEED", help="Seed of the first image's noise.", min=0, max=2**32 - 1)
    ] = 0,
    batch: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Images at a time, each of its own seed.", min=1, max=choices.MOST
        ),
    ] = 1,
    size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Height and width.", show_default="the model's", min=1, max=choices.MOST
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Height.", show_default="--size", min=1, max=choices.MOST),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Width.", show_default="--size", min=1, max=choices.MOST),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", help="Frames of a video.", show_default="the model's", min=1, max=choices.MOST
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the diffusers pipeline lies now: a folder, or OWNER/NAME of the hub.",
            show_default="where the compile found it",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="What runs the backbone.", show_default="the fastest that works here"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu or cuda.", show_default="where the target runs"),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=WEIGHT]",
            help="A LoRA for the slots of an artifact of --lora-slots; repeatable. torch of --compare gets it, too.",
        ),
    ] = None,
    no_warm_up: Annotated[
        bool, typer.Option("--no-warm-up", help="Time the first run, with all that it sets up.")
    ] = False,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Paint with the diffusers pipeline of an artifact and its compiled backbone; writes a PNG."""
    from diffc.cli.tables import painted
    from diffc.commands.generate import GenerateRequest, generate
    from diffc.models.sources.lora_files import parse_lora
    from diffc.models.sources.source import HubOptions

    request = GenerateRequest(
        artifact.expanduser().absolute(),
        output.expanduser().absolute(),
        prompt,
        negative_prompt=negative_prompt,
        compare=tuple(compare or ()),
        steps=steps,
        seed=seed,
        height=height or size,
        width=width or size,
        guidance=guidance,
        batch=batch,
        pipeline=pipeline,
        target=target,
        device=device,
        warm_up=not no_warm_up,
        loras=tuple(map(parse_lora, lora or ())),
        frames=frames,
        hub=HubOptions(revision, variant, subfolder, token, cache_dir),
    )
    painted(generate(request, terminal.ui), request, terminal)
