"""`diffc report`: an artifact, two of them, or a sweep as one HTML file."""

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
    "diffc report build/digits -o report.html",
    "diffc report build/fp8 --against build/nvfp4 --paint 'a red fox' -o report.html",
    "diffc report build/digits --layers --bench bench.json -o report.html",
)
_PAINT, _GIVEN = "Painting and measuring now", "Figures that are there already"


def report_command(
    terminal: Terminal,
    what: Annotated[
        Path, typer.Argument(metavar="ARTIFACT|SWEEP", help="What `diffc compile` or `diffc sweep` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .html file to write.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="Another artifact to stand beside the first."),
    ] = None,
    paint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT",
            help="Paint this with torch and the artifact; repeatable.",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Measure the error of each layer in each step, while torch paints.",
            rich_help_panel=_PAINT,
        ),
    ] = False,
    steps: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Denoising steps.", min=1, max=choices.MOST, rich_help_panel=_PAINT
        ),
    ] = 20,
    seed: Annotated[
        int,
        typer.Option(metavar="SEED", help="Seed of the noise.", min=0, max=2**32 - 1, rich_help_panel=_PAINT),
    ] = 0,
    size: Annotated[
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
            help="Where the diffusers pipeline lies now: a folder, or OWNER/NAME of the hub.",
            show_default="where the compile found it",
            rich_help_panel=_PAINT,
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Show these: the JSON of `diffc evaluate --data-path`.",
            rich_help_panel=_GIVEN,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `diffc bench --json` wrote.", rich_help_panel=_GIVEN),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `diffc evaluate --json` wrote.", rich_help_panel=_GIVEN),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write what is known of an artifact, of two, or of a sweep as one HTML file that needs no network."""
    from diffc.models.sources.source import HubOptions
    from diffc.report.build import report
    from diffc.report.request import ReportRequest

    request = ReportRequest(
        what.expanduser(),
        output.expanduser().absolute(),
        against=against and against.expanduser(),
        paint=tuple(paint or ()),
        layers=layers,
        steps=steps,
        seed=seed,
        size=size,
        pipeline=pipeline,
        pictures=pictures,
        bench=bench,
        scores=scores,
        hub=HubOptions(revision, variant, subfolder, token, cache_dir),
    )
    written = report(request, terminal.ui)
    terminal.line(f"Wrote {request.output}, {written / 1e6:.2f} MB")
    terminal.result({"file": str(request.output), "bytes": written})
