"""`diffc package`: an artifact as a folder that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli.command import examples
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc package build/fp8 -o build/fp8-optimum",
    "diffc package build/fp8 --components OPTIMUM_EXPORT -o build/fp8-optimum",
    "diffc package build/fp8 --layout triton -o build/repository",
    "diffc package build/fp8 --layout comfyui -o ComfyUI/custom_nodes/fp8",
)


def package_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    layout: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="optimum: what optimum-onnx's ORT pipelines load. triton: a model repository of Triton's"
            " inference server. comfyui: a custom node of ComfyUI.",
        ),
    ] = "optimum",
    components: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="An export of optimum-cli to take everything but the backbone from.",
            show_default="exported anew",
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
            metavar="TARGET",
            help="Whose model of the artifact.",
            show_default="the one that suits the layout best",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="TYPE", help="Type of the text encoders and the VAE: float16 or float32."),
    ] = "float16",
    skip_validation: Annotated[
        bool, typer.Option("--skip-validation", help="Do not compare the components with torch.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a package at -o.")] = False,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write an artifact as a folder that another program loads: optimum-onnx, Triton, ComfyUI."""
    from diffc.commands.package.request import PackageRequest
    from diffc.commands.package.run import package
    from diffc.models.sources.source import HubOptions

    request = PackageRequest(
        artifact.expanduser().absolute(),
        output.expanduser().absolute(),
        layout,
        components,
        pipeline,
        target,
        dtype,
        skip_validation,
        force,
        HubOptions(revision, variant, subfolder, token, cache_dir),
    )
    result = package(request, terminal.ui)
    for name, error in result.errors.items():
        terminal.line(f"  {name}: {error:.1e} from torch")
    for note in result.notes:
        terminal.line(f"  {note}")
    terminal.line(result.how)
    terminal.result(
        {
            "folder": str(result.folder),
            "class": result.pipeline_class,
            "errors": dict(result.errors),
            "notes": list(result.notes),
        }
    )
