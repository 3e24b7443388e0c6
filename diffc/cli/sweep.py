"""`diffc sweep`: many compiles, on the workers of this machine or of a Ray cluster."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples
from diffc.cli.compile import compile_command

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc sweep --model digits-sd3 digits-flux --format fp8 int8 -o build/sweep",
    "diffc sweep --model PIPELINE --format fp8 nvfp4 --sm 89 120 --exclude format=nvfp4,sm=89 -o build/sweep",
    "diffc sweep sweep.yaml -o build/sweep --dry-run",
    "diffc sweep sweep.yaml -o /shared/sweep --address ray-head:6379",
)
_AXES, _AFTER, _WORKERS = "Axes (each takes several values)", "After each compile", "Workers"


def sweep_command(
    terminal: Terminal,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the rows and artifacts.")
    ],
    file: Annotated[
        Path | None,
        typer.Argument(help="The options of this command as YAML: model: [A, B] for --model A B."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="Models, as compile takes them.",
            rich_help_panel=_AXES,
            autocompletion=completed(choices.models),
        ),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="{formats}.",
            rich_help_panel=_AXES,
            autocompletion=completed(choices.formats),
        ),
    ] = None,
    sm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="Compute capabilities, an artifact for each: {sms}.",
            rich_help_panel=_AXES,
            autocompletion=completed(choices.sms),
        ),
    ] = None,
    cache_plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="none, a plan of `diffc cache list`, or a file.",
            rich_help_panel=_AXES,
            autocompletion=completed(choices.cache_plans),
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LORA",
            help="none, or FILE[=WEIGHT]; 'A.safetensors + B.safetensors' are two in one artifact.",
            rich_help_panel=_AXES,
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="Compute types: {dtypes}.", rich_help_panel=_AXES),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Cells to leave out: 'format=nvfp4,sm=86|89', with * for any text; repeatable.",
            rich_help_panel=_AXES,
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="diffc validate, on other inputs.", rich_help_panel=_AFTER),
    ] = False,
    bench: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SIDE]",
            help="diffc bench, beside eager, compile or none.",
            show_default="not; eager without a SIDE",
            rich_help_panel=_AFTER,
        ),
    ] = None,
    bench_repeat: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Measured calls.", min=1, max=choices.MOST, rich_help_panel=_AFTER
        ),
    ] = 5,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[METRIC]",
            help="Paint with torch and the artifact, and judge: psnr, ssim.",
            show_default="not; both without a METRIC",
            rich_help_panel=_AFTER,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="What to paint for --evaluate.",
            show_default="4 of diffc's own",
            rich_help_panel=_AFTER,
        ),
    ] = None,
    paint_steps: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="Denoising steps for --evaluate.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_AFTER,
        ),
    ] = 8,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Compiles at a time on this machine.",
            min=1,
            max=1024,
            show_default="one for each core",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="What they may hold together, such as 24GB.",
            show_default="what is free",
            rich_help_panel=_WORKERS,
        ),
    ] = None,
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster; its machines share -o, or give --artifacts.",
            show_default="this machine",
            rich_help_panel=_WORKERS,
        ),
    ] = "",
    runner: Annotated[
        Literal["ray", "processes"],
        typer.Option(help="processes does without Ray, on this machine alone.", rich_help_panel=_WORKERS),
    ] = "ray",
    artifacts: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="A store for the artifacts: file:///FOLDER, s3://BUCKET/FOLDER.",
            show_default="-o",
            rich_help_panel=_WORKERS,
        ),
    ] = "",
    tries: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="How often a cell is begun whose worker dies.",
            min=1,
            max=100,
            rich_help_panel=_WORKERS,
        ),
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say which cells there are, and what they need, and stop.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace artifacts that were compiled from other options.")
    ] = False,
    **of_compile: Any,
) -> None:
    """Compile every combination of models, formats, GPUs, cache plans and LoRAs. Exit code 1: a cell failed."""
    from diffc.cli.sweeping import request_of_sweep, run

    own = {name: value for name, value in locals().items() if name not in ("terminal", "of_compile")}
    run(request_of_sweep(own, of_compile), terminal, dry_run=dry_run)


_LEFT_OUT = (
    "model",
    "output",
    "format",
    "sm",
    "dtype",
    "lora",
    "cache_plan",
    "dry_run",
    "force",
    "dump",
    "save_checkpoint",
)
"""Parameters of compile that are those of a cell, or of a single compile."""


def _with_options_of_compile() -> None:
    """Give `sweep_command` the options of `diffc compile` that all its cells share, with their types and help."""
    own = [p for p in inspect.signature(sweep_command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    theirs = list(inspect.signature(compile_command).parameters.values())[1:]
    added = [p.replace(kind=p.KEYWORD_ONLY) for p in theirs if p.name not in _LEFT_OUT]
    hints = get_type_hints(compile_command, localns={"Terminal": object}, include_extras=True)
    del sweep_command.__annotations__["of_compile"]
    sweep_command.__annotations__.update({p.name: hints[p.name] for p in added})
    sweep_command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]


_with_options_of_compile()
