"""`diffc evaluate`: metrics of pictures, in a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc evaluate --data-path pictures.json --metrics imagereward clip-iqa clip",
    "diffc evaluate --data-path pictures.json --metrics psnr ssim --reference torch --json figures.json",
    "diffc evaluate --data-path pictures.json --metrics lpips --alexnet alexnet.pth --sheet beside.png",
)


def evaluate_command(
    terminal: Terminal,
    data_path: Annotated[
        Path,
        typer.Option(
            "--data-path",
            metavar="FILE",
            help='JSON: [{"prompt": TEXT, "images": {MODEL: PATH, ...}}, ...].',
        ),
    ],
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
        list[str] | None, typer.Argument(metavar="METRIC", help="More metrics.", show_default=False)
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
    from diffc.commands.evaluate.run import EvaluateRequest, evaluate

    given = dict.fromkeys(
        part for text in (*(metrics or ()), *(more or ())) for part in text.split(",") if part
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
