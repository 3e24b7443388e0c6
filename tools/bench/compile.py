"""The same backbone to ONNX through diffc and through ModelOpt's own route, side by side: time, memory, bytes, nodes.

    python -m tools.bench.compile [--model flux-dev] [--depths 2 4] [--format fp8] [--routes diffc modelopt]
                                     [--folder DIR] [--weights DIR] [--pixels N] [--json FILE] [--plot FILE.png]

A depth is how many transformer blocks are kept of each kind (of every kind, FLUX: twice as many single ones); "full" is
the release. Weights are random and on disk before anything is measured; both routes get amax 1 everywhere, so that
calibration is no part of it. Each route runs in a process of its own, sampled while it runs. The ModelOpt route is what
its diffusers example does, step by step (`modelopt_route` names them): the model in memory, mtq.quantize,
torch.onnx.export at opset 20, the example's rewrite of the loaded result, one file of external data. It wants a GPU at
full size, and for NVFP4 at any. The route "copy" reads the weights and writes as many bytes as the route before it
left, through a buffer of 4 MB: what the disk alone takes. "diffc+loras" is ours with two LoRAs of rank 16 fused; its
wall time includes making their files, the sum of its stages does not. The weights are dropped from memory before each
route; the libraries are not, so let a small depth go first where their disk is slow. Their bytecode is written before
anything is measured, as pip does and uv does not: each route would compile thousands of files.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from diffc.models.embedded import random_model
from diffc.models.embedded.real import REAL, RealModel
from diffc.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "route",
    "parameters",
    "stage",
    "wall s",
    "CPU s",
    "peak RSS, GB",
    "read, GB",
    "written, GB",
    "on disk, GB",
    "nodes",
)


@dataclass(frozen=True)
class Shallow(RealModel):
    """A real model with fewer blocks."""

    depth: int = 0

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]  # a property there, kept here
        """The release's config with `depth` blocks of each kind."""
        config = dict(REAL[self.name].config)
        if "num_single_layers" in config:
            config["num_single_layers"] = 2 * self.depth
        if "num_layers" not in config:
            raise SystemExit(f"{self.name} has no depth to change; give --depths full")
        return config | {"num_layers": self.depth}


def main() -> int:
    """Run every depth through every route; 1 when one failed."""
    options = _options()
    rows: list[dict[str, Any]] = []
    compile_code(library_folders())
    with tempfile.TemporaryDirectory(prefix="diffc-bench-", dir=options.folder) as folder:
        for depth in options.depths:
            place = options.weights or Path(folder)
            made = place / f"{options.model}-{depth}"
            source = options.source or weights(options.model, depth, made)
            for route in options.routes:
                output = Path(folder) / f"out-{depth}-{route}"
                result = rows[-1]["on_disk"] if route == "copy" and rows else 0
                drop_cache(source)
                rows.append(measure(route, source, options.format, output, options.pixels, result))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(made, ignore_errors=True)
    Console(width=160).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(rows, options.plot)
    return int(any(row["error"] for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="flux-dev", choices=list(REAL))
    parser.add_argument("--depths", nargs="+", default=["2", "4"], help="numbers of blocks, or full")
    parser.add_argument("--format", default="fp8", choices=("fp8", "nvfp4"))
    parser.add_argument(
        "--routes",
        nargs="+",
        default=["diffc", "modelopt"],
        choices=("diffc", "diffc+loras", "copy", "modelopt"),
    )
    parser.add_argument("--source", type=Path, help="a backbone folder to take in the place of new weights")
    parser.add_argument("--folder", type=Path, help="where the weights and results lie while it runs")
    parser.add_argument("--weights", type=Path, help="where the weights lie, if elsewhere (in memory, say)")
    parser.add_argument("--pixels", type=int, default=0, help="image size that ModelOpt's route traces at")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument(
        "--plot", type=Path, help="draw time and memory against parameters (needs matplotlib)"
    )
    return parser.parse_args()


def library_folders() -> set[Path]:
    """Where the code lies that routes import: this project's, and all that is installed beside the libraries."""
    own, libraries = ("diffc", "passes"), ("torch", "diffusers", "modelopt", "onnx")
    origins = {name: getattr(find_spec(name), "origin", None) for name in (*own, *libraries)}
    folders = {name: Path(origin).parent for name, origin in origins.items() if origin}
    return {folder if name in own else folder.parent for name, folder in folders.items()}


def compile_code(folders: set[Path]) -> None:
    """Write the bytecode of every file that has none or an old one, on all cores. What cannot be is left as it is."""
    for folder in folders:
        compileall.compile_dir(folder, maxlevels=50, quiet=2, workers=0)


def weights(name: str, depth: str, folder: Path) -> Path:
    """A backbone folder with random weights."""
    if depth == "full":
        return random_model.make_random(name, folder)
    folder.mkdir(parents=True)
    known = REAL[name]
    model = Shallow(name, known.family, known.dtype, 0, known.description, depth=int(depth))
    random_model.write_backbone(model, folder, 0, Silent())
    return folder


def drop_cache(source: Path) -> None:
    """Let every route read the weights from the disk, where the system lets us; libraries stay as they are."""
    if not hasattr(os, "posix_fadvise"):
        return
    os.sync()
    for file in source.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    route: str, source: Path, format: str, output: Path, pixels: int = 0, result: int = 0
) -> dict[str, Any]:
    """One route in a process of its own; its stages, and what the process took.

    `result` is how many bytes the route "copy" writes, 0 for as many as it reads.
    """
    output.mkdir()
    report = output / "report.json"
    command = [
        sys.executable,
        "-m",
        "tools.bench.routes",
        route,
        str(source),
        format,
        str(output),
        str(report),
    ]
    command += [str(pixels), str(result)]
    started = time.perf_counter()
    with (output / "log.txt").open("w", encoding="utf-8") as log:
        process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        watcher = Watcher(process)
        watcher.start()
        code = process.wait()
        watcher.join()
    row: dict[str, Any] = {
        "route": route,
        "format": format,
        "error": "",
        "wall": time.perf_counter() - started,
    }
    if code or not report.is_file():
        row["error"] = (output / "log.txt").read_text(encoding="utf-8", errors="replace")[
            -800:
        ] or f"exit code {code}"
    else:
        row |= json.loads(report.read_text(encoding="utf-8"))
    files = [file for file in output.rglob("*") if file.is_file() and file != report]
    row |= {"on_disk": sum(file.stat().st_size for file in files), **watcher.seen}
    shutil.rmtree(output)
    return row


class Watcher(threading.Thread):
    """Samples a process until it ends: peak memory with its children's, CPU seconds, bytes read and written."""

    def __init__(self, process: psutil.Popen):
        super().__init__(daemon=True)
        self.process = process
        self.seen: dict[str, float] = {"peak_rss": 0.0, "cpu": 0.0, "read": 0.0, "written": 0.0}

    def run(self) -> None:
        """Sample every 50 ms."""
        while True:
            try:
                self._sample()
            except psutil.Error:
                return
            time.sleep(0.05)

    def _sample(self) -> None:
        memory = self.process.memory_info().rss
        memory += sum(child.memory_info().rss for child in self.process.children(recursive=True))
        self.seen["peak_rss"] = max(self.seen["peak_rss"], memory)
        times = self.process.cpu_times()
        self.seen["cpu"] = times.user + times.system
        if hasattr(self.process, "io_counters"):
            counters = self.process.io_counters()
            self.seen["read"] = getattr(counters, "read_chars", counters.read_bytes)
            self.seen["written"] = getattr(counters, "write_chars", counters.write_bytes)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each stage and one for the whole process."""
    out = Table(*COLUMNS)
    for row in rows:
        parameters = f"{row.get('parameters', 0) / 1e9:.2f} B"
        for stage in row.get("stages", []):
            out.add_row(
                row["route"], parameters, stage["name"], f"{stage['wall']:.1f}", f"{stage['cpu']:.1f}"
            )
        out.add_row(
            *(row["route"], parameters, "[bold]all[/bold]", f"{row['wall']:.1f}", f"{row['cpu']:.1f}"),
            *(f"{row[key] / 1e9:.2f}" for key in ("peak_rss", "read", "written", "on_disk")),
            str(row.get("nodes", "")) if not row["error"] else row["error"].splitlines()[-1][:60],
        )
    return out


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Wall time and peak memory against parameters, a line for each route."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for axis, key, label, unit in (
        (axes[0], "wall", "wall time, s", 1.0),
        (axes[1], "peak_rss", "peak memory, GB", 1e9),
    ):
        for route in dict.fromkeys(row["route"] for row in rows):
            done = sorted(
                (r for r in rows if r["route"] == route and not r["error"]), key=lambda r: r["parameters"]
            )
            axis.plot([r["parameters"] / 1e9 for r in done], [r[key] / unit for r in done], "o-", label=route)
        axis.set(xlabel="parameters, billion", ylabel=label, ylim=(0, None))
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
