"""What training gains in pictures: trained models in nvfp4, calibrated alone and trained by each method.

    python -m tools.pages.training [--models digits-sd3 ...] [--methods qad qat] [--steps 200] [--device cpu]
                                   [--json FILE] [--write docs/training-figures.md]

Each model is compiled once from calibration, as tools/pages/quality.py does it, and trained from that very calibration.
What is trained is compiled too, validated against torch, and paints the same prompts from the same noise. --data digits
needs scikit-learn. Exits with 1 when a model is handed back worse than calibration alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffc.compile.spine import compile_model
from diffc.quality.painting import TOKENS, judge
from diffc.quality.strips import encode
from diffc.runtime.load import load
from diffc.train.digits import prompts
from diffc.train.request import TrainRequest
from diffc.train.run import train
from passes.files.atomic import write_text
from tools.pages.quality import MODELS, Setup, _painted, _reference, cell_request

CELL = "nvfp4"


def main() -> int:
    """Run what is asked for; 1 when a training has lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["digits-sd3", "digits-sdxl"], choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=["qad", "qat"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rate", type=float, help="instead of the ladder")
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model in options.models:
        with tempfile.TemporaryDirectory(prefix="diffc-training-") as folder:
            rows += _rows(model, Path(folder), options)
        if options.json:
            write_text(options.json, json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    return int(any(row["after"]["snr"] < row["before"]["snr"] for row in rows if "after" in row))


def _rows(model: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Calibration alone, then each method."""
    setup = Setup(images=options.images)
    request = cell_request(model, CELL, folder / "ptq", setup)
    compile_model(request)
    reference, _ = _reference(model, setup)
    rows = [{"model": model, "method": "calibration", **_pictures(model, request.output, reference, setup)}]
    for method in options.methods:
        wanted = TrainRequest(
            model,
            folder / method,
            CELL,
            method,
            data="digits" if method.endswith("qat") else "",
            steps=options.steps,
            rate=options.rate,
            ema=options.ema,
            text_tokens=TOKENS,
            prompts=tuple(prompts()[0]),
            from_checkpoint=request.output / "checkpoint",
            device=options.device,
        )
        result = train(wanted)
        output = folder / f"{method}-compiled"
        compile_model(replace(request, output=output, from_checkpoint=result.output, skip_validation=False))
        row = {"model": model, "method": method, **result.to_json(), "device": options.device}
        rows.append(row | _pictures(model, output, reference, setup))
        print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("strip", "curve")}), flush=True)
    return rows


def _pictures(model: str, artifact: Path, reference: Any, setup: Setup) -> dict[str, Any]:
    """The figures of the pictures that an artifact paints."""
    started = time.perf_counter()
    with load(artifact, target="ort", dtype=reference.dtype) as backbone:
        images = _painted(model, backbone, setup)
    found = judge(images, reference)
    return {
        "right": found.right,
        "psnr": found.psnr,
        "ssim": found.ssim,
        "paint_s": round(time.perf_counter() - started, 1),
        "strip": encode(images[:10].nan_to_num()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | method | rate | SNR unseen, dB | SNR seen, dB | PSNR, dB | SSIM | read as asked | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        before, after = row.get("before"), row.get("after")
        snr = seen = rate = seconds = ""
        if before and after:
            snr = f"{before['snr']:.2f} -> {after['snr']:.2f}"
            seen = "" if after["seen"] is None else f"{before['seen']:.2f} -> {after['seen']:.2f}"
            rate, seconds = f"{row['rate']:g}", f"{row['seconds']:.0f}"
        lines.append(
            f"| {row['model']} | {row['method']} | {rate} | {snr} | {seen} | {row['psnr']:.1f} | {row['ssim']:.3f}"
            f" | {row['right']:.0%} | {seconds} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
