"""What LoRAs look like in a compiled model: digits-sd3 in FP8 with its two styles, beside torch and PEFT.

    python -m tools.pages.lora [--images 20] [--steps 10] [--json FILE] [--picture docs/lora.png]

Needs peft. Every row is a set of LoRAs with weights. torch paints it in float32 through diffusers' load_lora_weights
and set_adapters; one FP8 artifact paints it through its slots; and for --fused rows an FP8 artifact with the LoRAs in
its weights does. PSNR is against torch with the same LoRAs: that of the row without any is what FP8 alone costs. All
paint the same prompts from the same noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from diffc.compile.spine import CompileRequest, compile_model
from diffc.models.embedded import digits
from diffc.models.embedded.loras import EMBEDDED_LORAS
from diffc.models.sources.lora_files import LoraSpec
from diffc.quality.painting import judge, load_pipeline, paint
from diffc.quality.strips import decode, encode, sheet
from diffc.runtime.load import load

MODEL, INVERTED, SLANTED = "digits-sd3", "digits-inverted", "digits-slanted"
ROWS: dict[str, dict[str, float]] = {
    "off": {},
    "inverted": {INVERTED: 1.0},
    "inverted, half": {INVERTED: 0.5},
    "slanted": {SLANTED: 1.0},
    "both": {INVERTED: 1.0, SLANTED: 1.0},
}
RANK = 16
"""Of the slots: two LoRAs of rank 8."""
CALIBRATION_SEED, BATCH, SHOWN = 10_000, 10, 10


def request(output: Path, row: str | None) -> CompileRequest:
    """The FP8 compile with the LoRAs of `row` fused, or with slots for None."""
    loras = tuple(LoraSpec(name, weight) for name, weight in ROWS[row].items()) if row else ()
    return CompileRequest(
        MODEL,
        output,
        "fp8",
        ("ort",),
        dtype="float16",
        prompts=tuple(digits.prompt(digit) for digit in range(10)),
        steps=5,
        batch_size=10,
        image_size=digits.PIXELS,
        seed=CALIBRATION_SEED,
        loras=loras,
        lora_slots=0 if row else RANK,
    )


def torch_pictures(images: int, steps: int) -> dict[str, Tensor]:
    """What torch and PEFT paint, by row."""
    pipe = load_pipeline(MODEL)
    for name, file in EMBEDDED_LORAS.items():
        pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    painted = {}
    for row, weights in ROWS.items():
        if weights:
            pipe.enable_lora()
            pipe.set_adapters(list(weights), list(weights.values()))
        else:
            pipe.disable_lora()
        painted[row] = paint(pipe, images, steps=steps, batch=BATCH)
    return painted


def slot_pictures(folder: Path, images: int, steps: int) -> dict[str, Tensor]:
    """What one artifact paints with one row after another in its slots."""
    compile_model(request(folder, None))
    pipe, painted = load_pipeline(MODEL), {}
    with load(folder, target="ort", dtype=pipe.transformer.dtype) as backbone:
        pipe.transformer = backbone
        for row, weights in ROWS.items():
            backbone.set_lora(list(weights), list(weights.values()))
            painted[row] = paint(pipe, images, steps=steps, batch=BATCH)
    return painted


def fused_pictures(folder: Path, row: str, images: int, steps: int) -> Tensor:
    """What an artifact with the LoRAs of a row in its weights paints."""
    compile_model(request(folder, row))
    pipe = load_pipeline(MODEL)
    with load(folder, target="ort", dtype=pipe.transformer.dtype) as backbone:
        pipe.transformer = backbone
        return paint(pipe, images, steps=steps, batch=BATCH)


def figures(row: str, way: str, images: Tensor, reference: Tensor) -> dict[str, Any]:
    """A row of the table, with the first pictures."""
    found = judge(images, reference)
    return {
        "row": row,
        "way": way,
        "psnr": round(found.psnr, 1),
        "ssim": round(found.ssim, 4),
        "grey": round(float(images.mean()), 3),
        "strip": encode(images[:SHOWN]),
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/lora.md."""
    lines = ["| LoRAs | by | PSNR, dB | SSIM | mean grey |", "|---|---|---|---|---|"]
    for row in rows:
        against = ["", ""] if row["way"] == "torch" else [f"{row['psnr']}", f"{row['ssim']}"]
        lines.append(f"| {row['row']} | {row['way']} | {' | '.join(against)} | {row['grey']} |")
    return "\n".join(lines)


def main() -> int:
    """Paint, print the table, and write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fused", nargs="*", default=["inverted", "both"], choices=list(ROWS))
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--picture", type=Path, help="write the pictures to this file")
    asked = parser.parse_args()
    size = asked.images, asked.steps
    torch_row = torch_pictures(*size)
    painted = {(row, "torch"): images for row, images in torch_row.items()}
    with tempfile.TemporaryDirectory(prefix="diffc-lora-") as folder:
        slots = slot_pictures(Path(folder) / "slots", *size)
        painted |= {(row, "slots"): images for row, images in slots.items()}
        for number, row in enumerate(asked.fused):
            painted[row, "fused"] = fused_pictures(Path(folder) / f"fused-{number}", row, *size)
    ordered = sorted(painted, key=lambda key: list(ROWS).index(key[0]))
    rows = [figures(row, way, painted[row, way], torch_row[row]) for row, way in ordered]
    print(markdown(rows))
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if asked.picture:
        sheet([(f"{r['row']}: {r['way']}", decode(r["strip"])) for r in rows]).save(
            asked.picture, optimize=True
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
