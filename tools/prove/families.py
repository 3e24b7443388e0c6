"""Compiles a tiny pipeline of every class that is read off its pipeline, and writes what came of it as a table.

    python -m tools.prove.families --write docs/families.md
    python -m tools.prove.families --formats none,fp8 --models sd15,ltx --targets ort --jobs 4

Weights are seeded, head sizes real, everything else small. A row has the largest relative L2 error of ONNX Runtime
against torch at two shapes that differ from the traced one in every axis, the engines that TensorRT-RTX built, and
how near the pipeline's pictures with the compiled backbone are to those of torch. Rows are kept in --rows, so that
runs of some models, formats or targets add up; what no run has reached stands in the table as not run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffc.quantize.formats import FORMATS
from tools.prove.family_models import MODELS, make
from tools.prove.family_rows import MHA, Row, load_rows, measured, merged, save_rows

SMS = "89,120"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
ROWS = Path(__file__).with_name("families.json")
NAMES = (
    "none",
    "int8",
    "fp8",
    f"fp8{MHA}",
    "nvfp4",
    *(n for n in FORMATS if n not in ("none", "int8", "fp8", "nvfp4")),
)
HEAD = "| pipeline | class | format | largest rel. L2 | engines | PSNR dB | result |\n|---|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """A row as Markdown."""
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row.errors.items()) or "-"
    psnr = "-" if row.psnr is None else f"{row.psnr:.1f}"
    result = row.result.replace("|", "/")
    cells = (row.model, row.backbone, row.format, errors, " ".join(row.engines) or "-", psnr, result)
    return f"| {' | '.join(cells)} |"


def table(rows: dict[tuple[str, str], Row], models: Sequence[str], formats: Sequence[str]) -> str:
    """All rows of `models` and `formats` as Markdown; formats of a model that were not run share a line."""
    lines = [HEAD]
    for model in models:
        found = [rows[model, f] for f in formats if (model, f) in rows]
        lines += [line(row) for row in found]
        if lacking := [f for f in formats if (model, f) not in rows]:
            backbone = MODELS[model].backbone if model in MODELS else found[0].backbone if found else "-"
            lines.append(f"| {model} | {backbone} | {', '.join(lacking)} | - | - | - | not run |")
    return "\n".join(lines)


def write(page: Path, text: str) -> None:
    """Replace what a page has between its two marks."""
    old = page.read_text(encoding="utf-8")
    before, after = old.partition(BEGIN)[0], old.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8", newline="\n")


def run_all(jobs: int, tasks: Sequence[tuple[Any, ...]]) -> Iterator[Row]:
    """The rows of the tasks, which are arguments of `measured`, as they come."""
    if jobs == 1:
        yield from (measured(*task) for task in tasks)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from (done.result() for done in as_completed([pool.submit(measured, *t) for t in tasks]))


def main(arguments: Sequence[str]) -> int:
    """Compile, print the rows as they come, and write the table where --write says. 1 when a compile failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(MODELS), help="names or pipeline folders, comma separated"
    )
    parser.add_argument(
        "--formats", default=",".join(NAMES), help="formats, comma separated; fp8+mha: attention"
    )
    parser.add_argument("--targets", default="trt-rtx,ort", help="targets, comma separated")
    parser.add_argument("--sms", default=SMS, help="compute capabilities of engines, comma separated")
    parser.add_argument("--dtype", default="float16", help="compute type")
    parser.add_argument("--jobs", type=int, default=1, help="compiles at a time")
    parser.add_argument("--folder", type=Path, help="where models and artifacts are kept")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file that keeps the rows")
    parser.add_argument(
        "--new", action="store_true", help="leave out what the file has a row without fault of"
    )
    parser.add_argument("--write", type=Path, help="a page with the two marks of the table")
    given = parser.parse_args(arguments)
    models, formats, targets = given.models.split(","), given.formats.split(","), given.targets.split(",")
    rows = load_rows(given.rows)
    kept = {key for key, row in rows.items() if given.new and row.result == "ok"}
    sms, failed = [int(sm) for sm in given.sms.split(",")], False
    with TemporaryDirectory(prefix="diffc-families-") as temporary:
        folder = given.folder or Path(temporary)
        for model in models:
            if model in MODELS:
                make(model, folder)
        asked = [(model, f) for f in formats for model in models if (Path(model).name, f) not in kept]
        print(HEAD, flush=True)
        for row in run_all(given.jobs, [(*a, given.dtype, folder, targets, sms) for a in asked]):
            rows[row.key] = merged(rows.get(row.key), row)
            print(f"{line(row)} {row.seconds:.0f} s", flush=True)
            save_rows(given.rows, rows.values())
            failed |= row.result != "ok"
    if given.write:
        names = dict.fromkeys([*MODELS, *(name for name, _ in rows)])
        write(given.write, table(rows, list(names), NAMES))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
