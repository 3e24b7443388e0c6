"""What `diffc bench` leaves: a table, JSON that names the machine, and a plot."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from diffc.artifact.describe import versions
from diffc.artifact.folder import Artifact
from diffc.backends.install import install_command
from diffc.commands.bench.run import Row
from diffc.commands.bench.worker import MIB
from diffc.errors import DiffcError, UsageError
from diffc.output_files import check_output_file, save_figure
from diffc.terminal_text import cell


def check_plot(path: Path | None) -> None:
    """Raise DiffcError when a plot is asked for and cannot be drawn: before anything is measured."""
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} is not the name of a plot", fix="end it in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise DiffcError("--plot needs matplotlib, which is not installed", fix=install_command("plot"))


def check_folder(path: Path | None) -> None:
    """Raise DiffcError when `path` is given and cannot be written: its folder does not exist, or it is not a file."""
    if path is not None:
        check_output_file(path)


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For every shape: median and spread, throughput, memory, and how far the outputs are apart."""
    for shape in dict.fromkeys(row.shape for row in rows):
        mine = [row for row in rows if row.shape == shape]
        title = cell(f"{shape}; ms a step")
        table = Table("side", *_HEAD, title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
        for row in (row for row in mine if row.seconds):
            table.add_row(_NAMES[row.side], *_figures(row, mine))
        failed = [row for row in mine if not row.seconds]
        reasons = (f"{_NAMES[row.side]} was not measured: {row.reason}" for row in failed)
        table.caption = cell("\n".join(reasons)) if failed else None
        table.caption_justify = "left"
        yield table


_NAMES = {"compiled": "compiled", "eager": "torch eager", "compile": "torch.compile"}
_HEAD = ("median", "quartiles", "least", "images/s", "to eager", "MiB", "first", "rel. L2")


def _figures(row: Row, rows: Sequence[Row]) -> list[str]:
    low, median, high = row.quartiles
    base = next((r.quartiles[1] for r in rows if r.side == "eager" and r.seconds), None)
    memory = (row.memory.gpu or row.memory.rss) if row.memory else None
    return [
        _ms(median),
        f"{_ms(low)}-{_ms(high)}",
        _ms(min(row.seconds)),
        f"{row.shape.batch / median:.3g}",
        "-" if base is None else f"{base / median:.2f} x",
        "-" if memory is None else f"{memory / MIB:.0f}",
        f"{row.first or 0.0:.1f} s",
        "-" if row.rel_l2 is None else f"{row.rel_l2:.1e}",
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def described(rows: Sequence[Row], artifact: Path) -> dict[str, Any]:
    """All figures, with the machine and the versions that they belong to."""
    manifest = Artifact.load(artifact).manifest
    return {
        "model": manifest["model"]["name"],
        "format": manifest["format"],
        "dtype": manifest["dtype"],
        "machine": machine(),
        "versions": versions(),
        "rows": [_described(row) for row in rows],
    }


def _described(row: Row) -> dict[str, Any]:
    content = asdict(row)
    if row.seconds:
        low, median, high = row.quartiles
        content |= {
            "median": median,
            "lower_quartile": low,
            "upper_quartile": high,
            "least": min(row.seconds),
        }
        content |= {"steps_per_second": 1 / median, "images_per_second": row.shape.batch / median}
    return content


def machine() -> dict[str, Any]:
    """Processor, cores, threads that torch takes, and the GPU."""
    import psutil
    import torch

    return {
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def save_plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the median with the quartiles, a group for each shape; sides that failed are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if row.seconds]
    shapes = list(dict.fromkeys(row.shape for row in good))
    sides = list(dict.fromkeys(row.side for row in good))
    figure, axes = pyplot.subplots(figsize=(2 + 2.2 * max(1, len(shapes)), 4), layout="constrained")
    width = 0.8 / max(1, len(sides))
    for i, side in enumerate(sides):
        mine = [row for row in good if row.side == side]
        places = [shapes.index(row.shape) + (i - (len(sides) - 1) / 2) * width for row in mine]
        bars = axes.bar(places, [1e3 * r.quartiles[1] for r in mine], width, label=_NAMES[side])
        spread = [[1e3 * abs(r.quartiles[k] - r.quartiles[1]) for r in mine] for k in (0, 2)]
        axes.errorbar(
            places, [1e3 * r.quartiles[1] for r in mine], spread, fmt="none", ecolor="black", capsize=3
        )
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    axes.margins(y=0.3)
    axes.set_xticks(range(len(shapes)), [str(shape).replace(", ", "\n") for shape in shapes])
    axes.set_ylabel("ms a step (median, quartiles)")
    axes.set_title(title)
    axes.legend()
    save_figure(figure, path)
    pyplot.close(figure)
