"""`diffc validate`: run a finished artifact again and compare it with its torch model, or with another graph."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.command import examples
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc validate build/fp8",
    "diffc validate build/fp8 --target trt-rtx --shape batch=1,height=1024,width=1024",
    "diffc validate build/fp8 --bisect",
    "diffc validate build/fp8 --against other.onnx",
)


def validate_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="ort (the CPU, exactly what the graph says), or what diffc.load runs: ort-cuda, trt-rtx ...",
        ),
    ] = "ort",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="torch, ort (its own graph in float32), an artifact, or an .onnx file.",
            show_default="torch",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Where the torch model lies now: a folder, or OWNER/NAME of the hub.",
            show_default="where the compile found it",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZES",
            help="Such as batch=2,height=128,width=64,text=40; repeatable.",
            show_default="two small ones",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SEED",
            help="Seed of the inputs; repeatable.",
            min=0,
            max=2**32 - 1,
            show_default="one more than the compile's",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            help="Relative L2 error that is allowed.",
            show_default="that of format and type",
        ),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the modules that are wrong, each by itself.")
    ] = False,
    script: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write what `polygraphy run` repeats this with to this folder."),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Run an artifact again and compare it with torch, or with another graph. Exit code 3: it differs."""
    from diffc.cli.comparisons import compared, modules_compared
    from diffc.commands.validate import ValidateRequest, validate_artifact
    from diffc.models.sources.source import HubOptions

    request = ValidateRequest(
        artifact.expanduser().absolute(),
        target,
        against,
        model,
        tuple(shape or ()),
        tuple(seed or ()),
        tolerance,
        HubOptions(revision, variant, subfolder, token, cache_dir),
    )
    result = validate_artifact(request, terminal.ui, bisect=bisect, script=script)
    compared(result.reports, terminal, f"{target} against {result.against}")
    modules_compared(result.modules, terminal)
    terminal.result(result.to_json())
    if script is not None:
        terminal.line(f"Repeat it with: {shlex.join(('sh', str(script / 'run.sh')))}")
    result.require_match()
