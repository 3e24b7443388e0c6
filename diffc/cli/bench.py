"""`diffc bench`: a compiled backbone beside torch eager and torch.compile, on this machine."""

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
    "diffc bench build/fp8",
    "diffc bench build/fp8 --against eager --shape batch=1,height=1024,width=1024 --json fp8.json",
)


def bench_command(
    terminal: Terminal,
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIDE", help="eager, compile or none; repeatable.", show_default="eager and compile"
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET", help="What runs the artifact.", show_default="the best that runs here"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu or cuda.", show_default="cuda if there is one"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Where the torch model lies now.", show_default="where the compile found it"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZES",
            help="Such as batch=2,height=128; repeatable.",
            show_default="the profile's optimum",
        ),
    ] = None,
    repeat: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Measured calls of every side at a shape.", min=1, max=choices.MOST
        ),
    ] = 20,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Record the compiled side's launches and replay them.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the inputs.", min=0, max=2**32 - 1)] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the medians into this .png, .svg or .pdf."),
    ] = None,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Measure latency, throughput and memory of an artifact beside torch. Exit code 1: a side failed."""
    from diffc.commands.bench import output
    from diffc.commands.bench.run import BenchRequest, bench, require_measured
    from diffc.models.sources.source import HubOptions

    folder = artifact.expanduser().absolute()
    output.check_plot(plot)
    output.check_folder(plot)
    sides, shapes = tuple(against) if against else None, tuple(shape or ())
    hub = HubOptions(revision, variant, subfolder, token, cache_dir)
    request = BenchRequest(folder, sides, target, device, model, shapes, repeat, seed, cuda_graph, hub)
    rows = bench(request, terminal.ui)
    terminal.print(*output.tables(rows))
    terminal.result(output.described(rows, folder))
    if plot is not None:
        output.save_plot(rows, folder.name, plot)
        terminal.line(f"Wrote {plot}")
    require_measured(rows, against or ())
