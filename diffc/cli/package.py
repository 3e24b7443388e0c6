"""`diffc package`: an artifact and the rest of its pipeline as a folder that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def package_command(
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="optimum: what optimum-onnx's ORT pipelines load.")] = "optimum",
    components: Annotated[
        Path | None,
        typer.Option(help="Take everything but the backbone from this export of optimum-cli."),
    ] = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="The diffusers pipeline, if not where the compile found it.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Whose model of the artifact. [default: the first that ONNX Runtime runs]"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the text encoders and the VAE: float16 or float32.")
    ] = "float16",
    skip_validation: Annotated[
        bool, typer.Option("--skip-validation", help="Do not run the components against torch.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a package at -o.")] = False,
) -> None:
    """Write an artifact, text encoders, VAE and tokenizers as one folder for another runtime."""
    from diffc.cli.terminal import Terminal
    from diffc.commands.package.optimum import PackageRequest, package
    from diffc.terminal_text import styled

    ui = Terminal()
    result = package(
        PackageRequest(
            artifact.expanduser().absolute(),
            output.expanduser().absolute(),
            layout,
            components,
            pipeline,
            target,
            dtype,
            skip_validation,
            force,
        ),
        ui,
    )
    for name, error in result.errors.items():
        ui.note(f"{name}: {error:.1e} from torch")
    ui.console.print(
        styled(f"{result.pipeline_class}.from_pretrained({str(result.folder)!r})"), soft_wrap=True
    )
