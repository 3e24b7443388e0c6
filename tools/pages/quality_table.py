"""The quality table: for a terminal, and as the page docs/quality.md with its pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from PIL.Image import Image

TORCH = "torch"
"""The row of the unquantized model."""
POINTS = {"int4_awq": 5, "w4a8_awq": 5, "nvfp4": 5, "nvfp4_svdquant": 5}
"""Points (hundredths of all images) that a format may lose; every other one 2."""
COLUMNS = ("model", "format", "read as asked", "points lost", "limit", "PSNR, dB", "SSIM", "result")
WORST = 8  # layers that the page shows of a cell
Rows = Sequence[dict[str, Any]]
HEAD = """\
# Quality

Written by `python -m tools.pages.quality --images {images} --steps {steps}{kept} --json FILE --resume
--write docs/quality.md` (a run that was killed goes on from FILE) with {versions}.

Each trained model ([digits.md](digits.md)) paints {images} images in {steps} steps, every digit in turn, image i from
noise seeded with i, prompts "a handwritten ...", the pipeline's own guidance, T5 at 64 tokens: once in torch, in
float32 on the weights as they are stored, and once for each format with the compiled backbone, in float16 in ONNX
Runtime on the CPU, by `diffc.load` in diffusers' pipeline. All beside the backbone is the same. Calibration: the ten
prompts, from other noise.

*Read as asked* is the share that the classifier reads as the digit asked for. *Points lost* are hundredths of the
images, against torch; the limit is 5 for formats of 4 bits and 2 for the others. PSNR and SSIM are against torch's
images, mean over the images. They say how far a picture is from torch's, not how good it is: another stroke that is a
clean seven costs PSNR and no point. FP4 and FP8 run on the CPU as their values, exactly, in float arithmetic: what a
GPU's kernels sum in another order is not in here. Layers of digits-sdxl that are 64 wide stay unquantized in int4_awq
and w4a8_awq, whose blocks are 128: hence their figures there.

"""
METHODS = Path(__file__).with_name("quality_methods.md")
"""What was measured once, method by method: the page takes it as it is."""
TRAINED = """\

## After training

`diffc train` wins back part of what a format costs: nvfp4 of digits-sd3 goes from 19.0 to 21.3 dB, of digits-sdxl
from 29.2 to 30.6, in 200 steps of distillation without a data set. [training.md](training.md) has the figures, QAT
beside QAD, and seconds."""


def limit(cell: str) -> int:
    """Points that a cell of the matrix may lose."""
    return POINTS.get(cell.removesuffix("+mha"), 2)


def lost(cell: str, right: float, reference: float) -> bool:
    """Whether the share `right` is beyond the cell's limit below that of the reference."""
    return round(100 * (reference - right), 6) > limit(cell)


def cells_of(row: dict[str, Any], reference: float) -> tuple[str, ...]:
    """One row as text; `reference` is the share that the unquantized model has right."""
    if row["error"]:
        return row["model"], row["cell"], "", "", "", "", "", "failed: " + row["error"].splitlines()[0]
    right = f"{row['right']:.0%} of {row['images']}"
    if row["cell"] == TORCH:
        return row["model"], "torch, float32", right, "", "", "", "", "the reference"
    points = 100 * (reference - row["right"])
    near = "equal" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f}"
    return (
        *(row["model"], row["cell"], right, f"{points + 0.0:.0f}", str(limit(row["cell"]))),
        *(near, f"{row['ssim']:.3f}", "beyond" if lost(row["cell"], row["right"], reference) else "within"),
    )


def text_of(rows: Rows) -> list[tuple[str, ...]]:
    """All rows as text."""
    shares = {row["model"]: row["right"] for row in rows if row["cell"] == TORCH and not row["error"]}
    return [cells_of(row, shares.get(row["model"], 1.0)) for row in rows]


def terminal(rows: Rows) -> Table:
    """The rows for a terminal."""
    out = Table(*COLUMNS)
    for row in text_of(rows):
        out.add_row(*row)
    return out


def sheets(rows: Rows) -> dict[str, Image]:
    """File name -> picture of each model: a row for each cell, a column for each digit."""
    from diffc.quality.strips import decode, sheet

    out = {}
    for model in _models(rows):
        mine = [(row["cell"], decode(row["strip"])) for row in rows if _painted(row, model)]
        if mine:
            out[_file(model)] = sheet(mine)
    return out


def markdown(rows: Rows) -> str:
    """The page docs/quality.md."""
    text = text_of(rows)
    lines = [*_head(rows), "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in text]
    lines += ["", *METHODS.read_text(encoding="utf-8").splitlines()]
    lines += TRAINED.splitlines()
    lines += ["", "## Pictures", "", "The digits 0 to 9, the first noise of each.", ""]
    for model in _models(rows):
        if any(_painted(row, model) for row in rows):
            lines += [f"{model}:", "", f"![{model}: torch, and each format]({_file(model)})", ""]
    return "\n".join([*lines, *_layers(rows)]).rstrip() + "\n"


def _head(rows: Rows) -> list[str]:
    first: dict[str, Any] = rows[0] if rows else {"images": 0, "steps": 0, "keep": []}
    versions = ", ".join(
        f"{name} {_version(package)}"
        for name, package in (
            ("ONNX Runtime", "onnxruntime"),
            ("ModelOpt", "nvidia-modelopt"),
            ("torch", "torch"),
            ("diffusers", "diffusers"),
        )
    )
    kept = f" --keep {' '.join(first['keep'])}" if first["keep"] else ""
    return HEAD.format(**first | {"kept": kept}, versions=versions).splitlines()


def _layers(rows: Rows) -> list[str]:
    """A table for each cell whose layers were measured."""
    out: list[str] = []
    for row in rows:
        if not row.get("layers"):
            continue
        layers = row["layers"]
        middle = layers[len(layers) // 2]["snr"]
        out += [
            f"### {row['model']}, {row['cell']}",
            "",
            f"{len(layers)} quantized layers, median {middle:.1f} dB; the noisiest:",
            "",
            "| layer | SNR, dB |",
            "|---|---|",
        ]
        out += [f"| `{layer['path']}` | {layer['snr']:.1f} |" for layer in layers[:WORST]]
        out.append("")
    if not out:
        return []
    head = [
        "## Layers",
        "",
        "Signal-to-noise ratio of a quantized layer's output, by itself, on the inputs that it has",
    ]
    return [*head, "while the unquantized model paints ten digits.", "", *out]


def _models(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["model"] for row in rows))


def _painted(row: dict[str, Any], model: str) -> bool:
    return bool(row["model"] == model and not row["error"])


def _file(model: str) -> str:
    return f"quality-{model}.png"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"
