"""Compiles every embedded model to every format and prints what came out: the acceptance matrix.

    python tools/matrix.py [--models tiny-sd3 ...] [--formats fp8 ...] [--dtypes auto float32 ...] [--json FILE]

Each cell is a whole compile: calibrate, trace, rewrite, validate in ONNX Runtime, build TensorRT-RTX engines for
every compute capability that has the format. Exits with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from diffc.compile import CompileRequest, CompileResult, compile_model
from diffc.errors import DiffcError
from diffc.models.embedded import EMBEDDED
from diffc.quantize.formats import FORMATS
from passes import PassError

SMS = (86, 89, 120)


def main() -> int:
    """Run the cells asked for; 1 when one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(EMBEDDED), choices=list(EMBEDDED))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", default=["auto"], help="auto float32 float16 bfloat16")
    parser.add_argument("--steps", type=int, default=4, help="calibration steps")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    cells = [(m, f, d) for m in options.models for f in options.formats for d in options.dtypes]
    rows = [run_cell(*cell, options.steps) for cell in cells]
    Console(width=160).print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["error"] for row in rows))


def run_cell(model: str, format: str, dtype: str, steps: int) -> dict[str, Any]:
    """One compile; what went wrong is in the row, not raised."""
    sms = tuple(sm for sm in SMS if sm >= FORMATS[format].min_sm)
    row: dict[str, Any] = {"model": model, "format": format, "dtype": dtype, "error": ""}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="diffc-matrix-") as folder:
        request = CompileRequest(
            model, Path(folder) / "out", format, ("trt-rtx", "ort"), sms, dtype, steps=steps
        )
        try:
            row |= describe(compile_model(request))
        except (DiffcError, PassError) as error:
            row["error"] = str(error)
    row["seconds"] = round(time.perf_counter() - started, 1)
    print(" ".join(f"{k}={v}" for k, v in row.items()), file=sys.stderr, flush=True)
    return row


def describe(result: CompileResult) -> dict[str, Any]:
    """Sizes, errors and engines of one compile."""
    model = onnx.load(result.artifact.model, load_external_data=False)
    stored = [
        t
        for t in model.graph.initializer
        if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
    ]
    matrices = [t for t in stored if len(t.dims) > 1]
    worst: dict[str, float] = {}
    for report in result.validation:
        error = max(row.rel_l2 or 0.0 for row in report.rows)
        worst[report.arithmetic] = max(error, worst.get(report.arithmetic, 0.0))
    return {
        "stored_as": result.artifact.manifest["dtype"],
        "quantized_weights": len(matrices),
        "weight_bytes": sum(
            f["bytes"] for n, f in result.artifact.manifest["files"].items() if n == "model.onnx_data"
        ),
        "nodes": len(model.graph.node),
        "rel_l2": worst,
        "engines": {f"sm{e.sms[0]}": e.nbytes for e in result.engines},
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    out = Table(
        "model", "format", "type", "weights", "1-byte", "rel. L2 (computed in)", "engines, MB", "s", ""
    )
    for row in rows:
        errors = ", ".join(f"{v:.1e} ({k})" for k, v in row.get("rel_l2", {}).items())
        engines = " ".join(f"{k} {v / 1e6:.1f}" for k, v in row.get("engines", {}).items())
        out.add_row(
            row["model"],
            row["format"],
            row.get("stored_as", row["dtype"]),
            f"{row.get('weight_bytes', 0) / 1e6:.2f} MB",
            str(row.get("quantized_weights", "")),
            errors,
            engines,
            str(row["seconds"]),
            row["error"] or "ok",
        )
    return out


if __name__ == "__main__":
    sys.exit(main())
