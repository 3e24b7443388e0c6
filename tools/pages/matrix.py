"""Compiles every embedded model to every format and prints what came out: the acceptance matrix.

    python -m tools.pages.matrix [--models tiny-sd3 ...] [--cells fp8 nvfp4+mha ...] [--dtypes float16 bfloat16 ...]
                                 [--jobs 2] [--json FILE] [--write docs/matrix.md]

Each cell is a whole compile: calibrate, trace, rewrite, validate in ONNX Runtime, build TensorRT-RTX engines for every
compute capability that has the format; those that lack it must be refused before any work. The second type of a cell
takes the checkpoint of the first. Exits with 1 when a cell fails, or is not refused where it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from diffc.backends.sm import KNOWN_SMS
from diffc.compile.spine import CompileRequest, CompileResult, check, compile_model
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.quantize.options import QuantOptions
from passes import PassError
from tools.pages.matrix_table import markdown, terminal

MHA = QuantOptions(mha=True)
CELLS: dict[str, tuple[str, QuantOptions]] = {
    "none": ("none", QuantOptions()),
    "int8": ("int8", QuantOptions()),
    "int8_smoothquant": ("int8_smoothquant", QuantOptions(alpha=0.8)),
    "fp8": ("fp8", QuantOptions()),
    "fp8+mha": ("fp8", MHA),
    "int4_awq": ("int4_awq", QuantOptions()),
    "w4a8_awq": ("w4a8_awq", QuantOptions()),
    "nvfp4": ("nvfp4", QuantOptions()),
    "nvfp4+mha": ("nvfp4", MHA),
    "nvfp4_svdquant": ("nvfp4_svdquant", QuantOptions()),
    "mxfp8": ("mxfp8", QuantOptions()),
}

FOUR_SIX = QuantOptions(weight_scales="four-six")
VARIANTS: dict[str, tuple[str, QuantOptions]] = {
    **CELLS,
    "nvfp4+four-six": ("nvfp4", FOUR_SIX),
    "nvfp4_svdquant+four-six": ("nvfp4_svdquant", FOUR_SIX),
    **{f"nvfp4_svdquant+rank{n}": ("nvfp4_svdquant", QuantOptions(lowrank=n)) for n in (4, 8, 16)},
    **{f"nvfp4_svdquant+rank{n}+four-six": ("nvfp4_svdquant", replace(FOUR_SIX, lowrank=n)) for n in (4, 8)},
    **{f"int8_smoothquant+alpha{n}": ("int8_smoothquant", QuantOptions(alpha=n)) for n in (0.5, 0.8)},
}
"""The cells of the matrix, and cells with other options: tools/pages/quality.py takes both for --cells."""

TINY = [name for name in EMBEDDED if name.startswith("tiny-")]
"""The models of random weights; the trained ones are measured by tools/pages/quality.py."""


def main() -> int:
    """Run the cells asked for; 1 when one failed."""
    options = _options()
    rows = _kept(options.json) if options.resume else []
    there = {(row["model"], row["cell"], row["dtype"]) for row in rows if not row["error"]}
    rows = [row for row in rows if not row["error"]]
    jobs = [
        (m, c, tuple(d for d in options.dtypes if (m, c, d) not in there), options.steps)
        for m in options.models
        for c in options.cells
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_job, *job) for job in jobs if job[2]]):
            for row in done.result():
                print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)
                rows.append(row)
            _write(rows, options)
    Console(width=200).print(terminal(_write(rows, options)))
    return int(any(row["error"] for row in rows))


def _kept(file: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier run that ended early."""
    if file is None or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def _write(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the files asked for, rows in the order of the options; returns them in that order."""
    order = [(m, c, d) for m in EMBEDDED for c in CELLS for d in ("float32", "float16", "bfloat16")]
    rows = sorted(rows, key=lambda row: order.index((row["model"], row["cell"], row["dtype"])))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if options.write:
        options.write.write_text(markdown(rows), encoding="utf-8", newline="\n")
    return rows


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=TINY, choices=list(EMBEDDED))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--steps", type=int, default=2, help="calibration steps")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what the --json file has")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    return parser.parse_args()


def run_job(model: str, cell: str, dtypes: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """One cell in every type; what went wrong is in the rows, not raised."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="diffc-matrix-") as folder:
        checkpoint: Path | None = None
        for dtype in dtypes:
            rows.append(_run(model, cell, dtype, steps, Path(folder) / dtype, checkpoint))
            made = Path(folder) / dtype / "checkpoint"
            checkpoint = checkpoint or (made if made.is_dir() else None)
    return rows


def _run(
    model: str, cell: str, dtype: str, steps: int, output: Path, checkpoint: Path | None
) -> dict[str, Any]:
    format, options = CELLS[cell]
    started = time.perf_counter()
    row: dict[str, Any] = {"model": model, "cell": cell, "dtype": dtype, "error": "", "refused": {}}
    request = CompileRequest(
        model, output, format, ("trt-rtx", "ort"), (), dtype, from_checkpoint=checkpoint, options=options
    )
    request = replace(request, prompts=None, calib_size=4, steps=steps)
    try:
        row["refused"] = refused(request)
        sms = tuple(sm for sm in KNOWN_SMS if str(sm) not in row["refused"])
        if sms:
            row |= describe(compile_model(replace(request, sms=sms)))
    except (DiffcError, PassError) as error:
        row["error"] = str(error)
    except Exception as error:  # a defect in one cell must not lose the others
        row["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def refused(request: CompileRequest) -> dict[str, str]:
    """The compute capabilities that the check before a compile refuses, with its reason."""
    reasons = {}
    for sm in KNOWN_SMS:
        try:
            check(replace(request, sms=(sm,)))
        except UnsupportedError as error:
            reasons[str(sm)] = str(error).splitlines()[0]
    return reasons


def describe(result: CompileResult) -> Mapping[str, Any]:
    """Sizes, errors and engines of one compile."""
    model = onnx.load(result.artifact.model, load_external_data=False)
    stored = [t for t in model.graph.initializer if t.data_type in QUANTIZED and len(t.dims) > 1]
    worst: dict[str, float] = {}
    for report in result.validation:
        error = max(row.rel_l2 or 0.0 for row in report.rows)
        worst[report.arithmetic] = max(error, worst.get(report.arithmetic, 0.0))
    return {
        "quantized_weights": sum(_weights_in(t) for t in stored),
        "quantized_bytes": sum(_bytes_of(t) for t in stored),
        "weight_bytes": result.artifact.manifest["files"]["model.onnx_data"]["bytes"],
        "nodes": len(model.graph.node),
        "rel_l2": worst,
        "engines": {str(e.sms[0]): e.nbytes for e in result.engines},
    }


QUANTIZED = {
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.FLOAT8E4M3FN: 8,
    onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.UINT8: 8,
}
"""Element types of quantized weights and of their block scales -> bits."""


def _weights_in(tensor: onnx.TensorProto) -> int:
    """1 for a weight, 0 for the scales of one."""
    return int(not tensor.name.endswith("_scale"))


def _bytes_of(tensor: onnx.TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count * QUANTIZED[tensor.data_type] // 8


if __name__ == "__main__":
    sys.exit(main())
