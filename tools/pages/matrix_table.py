"""The acceptance matrix as a table: for a terminal, and for the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

from rich.table import Table

COLUMNS = ("model", "format", "type", "weights", "quantized", "rel. L2", "engines, MB", "s", "")
_SHORT = {"float32, activations not rounded": "smooth", "float32": "fp32", "float16": "fp16"}


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """One row as text."""
    errors = ", ".join(f"{_SHORT.get(k, k)} {v:.1e}" for k, v in row.get("rel_l2", {}).items())
    engines = " ".join(f"SM{k} {v / 1e6:.1f}" for k, v in row.get("engines", {}).items())
    refused = f"refused: {' '.join(f'SM{sm}' for sm in row['refused'])}" if row["refused"] else ""
    quantized = f"{row.get('quantized_weights', 0)}: {row.get('quantized_bytes', 0) / 1e6:.2f} MB"
    return (
        *(row["model"], row["cell"], row["dtype"]),
        *(f"{row.get('weight_bytes', 0) / 1e6:.2f} MB", quantized, errors, engines),
        *(str(row["seconds"]), row["error"] or refused or "ok"),
    )


def terminal(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    out = Table(*COLUMNS)
    for row in rows:
        out.add_row(*cells_of(row))
    return out


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The page docs/matrix.md."""
    built = sum(len(row.get("engines", {})) for row in rows)
    reasons = sorted({(f"SM{sm}", why) for row in rows for sm, why in row["refused"].items()})
    lines = [
        "# The acceptance matrix",
        "",
        "Written by `python -m tools.pages.matrix --write docs/matrix.md` with TensorRT-RTX"
        f" {_version('tensorrt-rtx')}, ONNX Runtime",
        f"{_version('onnxruntime')} and ModelOpt {_version('nvidia-modelopt')}: {len(rows)} compiles,"
        f" {built} engines, {sum(bool(r['error']) for r in rows)} failures.",
        "",
        "*rel. L2* is the largest relative L2 error against ModelOpt's fake-quantized torch model at two shapes:"
        " *smooth* with activations not rounded",
        "(limit 1e-5), *fp32* the float32 twin, *fp16* a float16 graph itself (docs/validation.md). *weights* are"
        " all stored weights of all of the",
        "cell's models, *quantized* the quantized matrices with their block scales.",
        "",
        "| " + " | ".join(COLUMNS[:-1]) + " | result |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(cells_of(row)) + " |" for row in rows]
    lines += ["", "## Refused before any work", ""]
    lines += [f"- {sm}: {why}" for sm, why in reasons]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
