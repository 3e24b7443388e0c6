"""Compiles a tiny pipeline of every class that is read off its pipeline, and prints what came of it as a table.

    python -m tools.prove.families --formats none,fp8 --models sd15,ltx --write docs/families.md

Weights are seeded, head sizes real, everything else small. A row has the largest relative L2 error of ONNX Runtime
against torch at two shapes that differ from the traced one in every axis, and the engines that TensorRT-RTX built.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from diffc.compile.spine import CompileRequest, CompileResult, compile_model
from diffc.errors import DiffcError
from diffc.quantize.formats import FORMATS
from passes import PassError
from tools.prove.family_models import MODELS, make

SMS = (89, 120)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_SHORT = {"float32, activations not rounded": "smooth"}


@dataclass(frozen=True)
class Row:
    """One compile: what was asked for, and what came of it."""

    model: str
    format: str
    errors: str
    engines: str
    seconds: float
    result: str

    def __str__(self) -> str:
        cells = (
            self.model,
            MODELS[self.model].backbone,
            self.format,
            self.errors,
            self.engines,
            f"{self.seconds:.0f}",
        )
        return f"| {' | '.join(cells)} | {self.result} |"


HEAD = "| pipeline | class | format | largest rel. L2 | engines | s | result |\n|---|---|---|---|---|---|---|"


def compiled(model: str, format: str, dtype: str, folder: Path, targets: Sequence[str]) -> Row:
    """Compile one model in one format; what diffc raises is the result."""
    started = time.monotonic()
    sms = tuple(sm for sm in SMS if sm >= FORMATS[format].min_sm) if "trt-rtx" in targets else ()
    request = CompileRequest(
        str(make(model, folder)),
        folder / f"{model}-{format}",
        format,
        tuple(targets),
        sms,
        dtype=dtype,
        force=True,
        steps=2,
        prompts=("a red fox asleep in fresh snow", "a wooden sign that reads OPEN"),
        image_size=64 if FORMATS[format].algorithm else None,
    )
    try:
        result = compile_model(request)
    except (DiffcError, PassError) as error:
        line = " ".join(str(error).split())[:300].replace("|", "/")
        return Row(model, format, "-", "-", time.monotonic() - started, f"{type(error).__name__}: {line}")
    return Row(model, format, _errors(result), _engines(result), time.monotonic() - started, "ok")


def _errors(result: CompileResult) -> str:
    """The largest error of each arithmetic, over shapes and outputs."""
    found: dict[str, float] = {}
    for report in result.validation:
        worst = max(row.rel_l2 or 0.0 for row in report.rows)
        found[report.arithmetic] = max(found.get(report.arithmetic, 0.0), worst)
    return ", ".join(f"{_SHORT.get(name, name)} {error:.1e}" for name, error in found.items())


def _engines(result: CompileResult) -> str:
    return " ".join(f"SM{e.sms[0]} {e.nbytes / 1e6:.1f} MB" for e in result.engines) or "-"


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    return "\n".join([HEAD, *map(str, rows)])


def write(page: Path, rows: Sequence[Row]) -> None:
    """Replace the table of a page, between its two marks."""
    text = page.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8", newline="\n")


def main(arguments: Sequence[str]) -> int:
    """Compile, print the table row by row, and write it where --write says. 1 when a compile failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="names, comma separated")
    parser.add_argument("--formats", default="none,int8,fp8,nvfp4", help="formats, comma separated")
    parser.add_argument("--targets", default="trt-rtx,ort", help="targets, comma separated")
    parser.add_argument("--dtype", default="float16", help="compute type")
    parser.add_argument("--folder", type=Path, help="where models and artifacts are kept")
    parser.add_argument("--write", type=Path, help="a page with the two marks of the table")
    given = parser.parse_args(arguments)
    rows = list[Row]()
    with TemporaryDirectory(prefix="diffc-families-") as temporary:
        folder = given.folder or Path(temporary)
        print(HEAD, flush=True)
        for model in given.models.split(","):
            for format in given.formats.split(","):
                rows.append(compiled(model, format, given.dtype, folder, given.targets.split(",")))
                print(rows[-1], flush=True)
    if given.write:
        write(given.write, rows)
    return int(any(row.result != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
