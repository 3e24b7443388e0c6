"""`diffc evaluate`: metrics of pictures, in a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffc.cli import choices
from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

_PAINT = "Pictures that are painted first"
EXAMPLES = examples(
    "diffc evaluate build/fp8 build/nvfp4 --prompts-file prompts.txt --metrics psnr ssim",
    "diffc evaluate --data-path pictures.json --metrics imagereward clip-iqa clip",
    "diffc evaluate --data-path pictures.json --metrics psnr ssim --reference torch --json figures.json",
    "diffc evaluate --data-path pictures.json --metrics lpips --alexnet alexnet.pth --sheet beside.png",
)


def evaluate_command(
    terminal: Terminal,
    data_path: Annotated[
        Path | None,
        typer.Option(
            "--data-path",
            metavar="FILE",
            help='Pictures that are there, JSON: [{"prompt": TEXT, "images": {MODEL: PATH, ...}}, ...].',
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            metavar="METRIC",
            help="imagereward, clip-iqa, clip, psnr, ssim, lpips, clip-fid, fid; several after one --metrics.",
            show_default="imagereward",
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ARTIFACT | METRIC]...",
            help="Folders of `diffc compile`, which paint --prompts-file; more metrics.",
            show_default=False,
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts for artifacts, as `diffc compile` takes them.",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="How many prompts to paint.",
            min=1,
            max=choices.MOST,
            show_default="all",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the pictures here; a run that was stopped goes on.",
            show_default="they are not kept",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    no_torch: Annotated[
        bool,
        typer.Option(
            "--no-torch",
            help="Do not paint with the uncompiled backbone, the reference otherwise.",
            rich_help_panel=_PAINT,
        ),
    ] = False,
    steps: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Denoising steps.", min=1, max=choices.MOST, rich_help_panel=_PAINT
        ),
    ] = 25,
    seed: Annotated[
        int,
        typer.Option(
            metavar="SEED",
            help="Seed of the first prompt's noise.",
            min=0,
            max=2**32 - 1,
            rich_help_panel=_PAINT,
        ),
    ] = 0,
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="SCALE",
            help="Guidance scale.",
            show_default="the pipeline's",
            min=0,
            rich_help_panel=_PAINT,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Height and width.",
            show_default="the model's",
            min=1,
            max=choices.MOST,
            rich_help_panel=_PAINT,
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the diffusers pipeline lies now.",
            show_default="where the compile found it",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="What runs the backbones.",
            show_default="the fastest that works here",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="The model that others are compared with.", show_default="the first"
        ),
    ] = "",
    clip_model: Annotated[
        str,
        typer.Option("--clip-model", metavar="DIR", help="CLIP: a folder or an id of the Hugging Face hub."),
    ] = "openai/clip-vit-large-patch14",
    imagereward: Annotated[
        str,
        typer.Option(
            "--imagereward", metavar="FILE", help="ImageReward.pt, or OWNER/REPOSITORY/FILE of the hub."
        ),
    ] = "zai-org/ImageReward/ImageReward.pt",
    bert: Annotated[
        str, typer.Option(metavar="DIR", help="ImageReward's vocabulary: a folder or an id of the hub.")
    ] = "google-bert/bert-base-uncased",
    alexnet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="torchvision's AlexNet, for lpips.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a PNG with the pictures side by side.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the networks run.")] = "cpu",
) -> None:
    """Judge pictures that models have made of the same prompts: means, intervals, differences to a reference."""
    from diffc.commands.evaluate.painting import Painting
    from diffc.commands.evaluate.request import EvaluateRequest
    from diffc.commands.evaluate.run import evaluate
    from diffc.compile.prompts import read_prompts

    artifacts = tuple(Path(text).expanduser().absolute() for text in more or () if Path(text).is_dir())
    texts = (*(metrics or ()), *(text for text in more or () if not Path(text).is_dir()))
    given = dict.fromkeys(part for text in texts for part in text.split(",") if part)
    painting = None
    if artifacts or prompts_file is not None:
        painting = Painting(
            artifacts,
            () if prompts_file is None else read_prompts(prompts_file, count),
            not no_torch,
            steps,
            seed,
            guidance,
            image_size,
            image_size,
            pipeline=pipeline,
            target=target,
        )
    request = EvaluateRequest(
        data_path,
        tuple(given) or ("imagereward",),
        reference,
        clip_model,
        imagereward,
        bert,
        alexnet,
        sheet,
        device,
        painting,
        pictures and pictures.expanduser().absolute(),
    )
    found = evaluate(request, terminal.ui)
    terminal.print(_table(found))
    for note in found.notes:
        terminal.line((note, "yellow"))
    if found.prompts < 50:
        terminal.line(f"{found.prompts} prompts: differences inside the intervals prove nothing")
    terminal.result(found.to_json())


def _table(found: Any) -> Any:
    """A row for each model, a column for each metric: mean, interval, and difference to the reference."""
    from diffc.cli.listings import plain_table
    from diffc.terminal_text import cell

    metrics = list(dict.fromkeys(score.metric for score in found.scores))
    by_place = {(score.model, score.metric): score for score in found.scores}
    table = plain_table("model", *metrics)
    for model in dict.fromkeys([found.reference, *(score.model for score in found.scores)]):
        row = [model + (" (reference)" if model == found.reference else "")]
        row += [_text(by_place.get((model, metric))) for metric in metrics]
        table.add_row(*map(cell, row))
    return table


def _text(score: Any) -> str:
    if score is None:
        return "-"
    lines = [f"{score.value.mean:.4g}"]
    if score.value.low is not None:
        lines[0] += f" ({score.value.low:.4g} to {score.value.high:.4g})"
    if score.difference is not None and score.difference.low is not None:
        d = score.difference
        lines.append(f"{d.mean:+.3g} ({d.low:+.3g} to {d.high:+.3g})")
    return "\n".join(lines)
