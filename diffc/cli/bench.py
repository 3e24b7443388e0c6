"""`diffc bench`: a compiled backbone beside torch eager and torch.compile, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench_command(
    artifact: Annotated[Path, typer.Argument(help="A folder that `diffc compile` wrote.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="eager, compile or none; repeatable. [default: eager and compile]"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="What runs the artifact. [default: the best that runs here]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: cuda if there is one]")] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the torch model lies, if not where the compile found it.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Such as batch=2,height=128; repeatable. [default: the profile's optimum]"),
    ] = None,
    repeat: Annotated[int, typer.Option(help="Measured calls of every side at a shape.", min=1)] = 20,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Record the compiled side's launches and replay them.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.", min=0, max=2**32 - 1)] = 0,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the medians into this .png, .svg or .pdf.")] = None,
) -> None:
    """Measure latency, throughput and memory of an artifact beside torch, in turns, on this machine."""
    from diffc.cli.terminal import Terminal
    from diffc.commands.bench import output
    from diffc.commands.bench.run import BenchRequest, bench
    from diffc.commands.bench.sides import SIDES
    from diffc.terminal_text import styled

    output.check_plot(plot)
    for path in (json, plot):
        output.check_folder(path)
    folder = artifact.expanduser().absolute()
    sides = tuple(name for name in dict.fromkeys(against or SIDES) if name != "none")
    shapes = tuple(shape or ())
    request = BenchRequest(folder, sides, target, device, model, shapes, repeat, seed, cuda_graph)
    ui = Terminal()
    rows = bench(request, ui)
    for table in output.tables(rows):
        ui.console.print(table)
    if json is not None:
        output.save_json(rows, folder, json)
    if plot is not None:
        output.save_plot(rows, folder.name, plot)
    for path in (json, plot):
        if path is not None:
            ui.console.print(styled(f"Wrote {path}"), soft_wrap=True)
