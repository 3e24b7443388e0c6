"""`diffc generate`: paint with a compiled backbone, beside torch or other artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate_command(
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    prompt: Annotated[str, typer.Option(help="What to paint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG to write.")],
    compare: Annotated[
        list[str] | None, typer.Option(help="torch, or another artifact, to paint beside it; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 25,
    seed: Annotated[int, typer.Option(help="Seed of the first image's noise.", min=0, max=2**32 - 1)] = 0,
    size: Annotated[
        int | None, typer.Option(help="Pixels of height and width. [default: the model's]", min=1)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. [default: the pipeline's]", min=0)
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at a time, each of its own seed.", min=1)] = 1,
    pipeline: Annotated[
        str | None, typer.Option(help="The diffusers folder, if not where the compile found it.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What runs the backbone. [default: the fastest that works here]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: where the target runs]")] = None,
) -> None:
    """Paint with the diffusers pipeline of an artifact and its compiled backbone; PNG out."""
    from diffc.cli.terminal import Terminal
    from diffc.commands.generate import GenerateRequest, generate, verdict
    from diffc.terminal_text import styled

    ui = Terminal()
    request = GenerateRequest(
        artifact.expanduser().absolute(),
        output.expanduser().absolute(),
        prompt,
        tuple(name if name == "torch" else str(Path(name).expanduser().absolute()) for name in compare or []),
        steps,
        seed,
        size,
        guidance,
        batch,
        pipeline,
        target,
        device,
    )
    for painted in generate(request, ui):
        near = "" if painted.psnr is None else f", PSNR {painted.psnr:.1f} dB, SSIM {painted.ssim:.3f}"
        said = verdict(painted, prompt)
        figures = f"{painted.seconds:.1f} s{near}{', ' + said if said else ''}"
        ui.console.print(styled(f"  {painted.name}: {figures}"), soft_wrap=True)
    ui.console.print(styled(f"Painted {request.output}"), soft_wrap=True)
