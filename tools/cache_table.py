"""Caching against fewer steps on a trained embedded model: times as fast, PSNR, and the share that reads as asked.

    python tools/cache_table.py digits-sdxl deepcache:every=2 modelopt-sdxl 10 13

A plan of `diffc cache list` or a number of steps in each row; torch on one CPU core, processor time of the pipeline.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from diffc import cache
from diffc.cache.searching import load_for_search
from diffc.models.digits import PIXELS, prompt
from diffc.quality.classifier import score
from diffc.ui import Silent


def main() -> None:
    """Print a row for every variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="digits-sd3, digits-flux or digits-sdxl")
    parser.add_argument("variants", nargs="+", help="cache plans and numbers of steps")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="steps of the full run and the plans")
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load_for_search(given.model, Silent())
    digits = [number % 10 for number in range(given.images)]
    full, seconds = paint(pipe, digits, given.steps, "")
    print(f"{'in full':32} 1.00 times as fast, {score(full, digits):.0%} read as asked")
    for variant in given.variants:
        fewer = variant.isdigit()
        steps, plan = (int(variant), "") if fewer else (given.steps, variant)
        images, took = paint(pipe, digits, steps, plan)
        name = f"{variant} steps" if fewer else variant
        figures = f"{seconds / took:.2f} times as fast, PSNR {psnr(full, images):.1f} dB"
        print(f"{name:32} {figures}, {score(images, digits):.0%} read as asked")


def paint(pipe: Any, digits: list[int], steps: int, plan: str) -> tuple[Any, float]:
    """Images [N, H, W, 3] in 0..1, image i from noise seeded with i, and the processor's seconds."""
    with cache.apply(pipe, plan) if plan else nullcontext():
        started = time.process_time()
        images = pipe(
            [prompt(digit) for digit in digits],
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(digits))],
            output_type="np",
            height=PIXELS,
            width=PIXELS,
        ).images
        return images, time.process_time() - started


def psnr(reference: Any, other: Any) -> float:
    """In dB, the mean over images."""
    return float(np.mean(-10 * np.log10(((reference - other) ** 2).mean(axis=(1, 2, 3)))))


if __name__ == "__main__":
    main()
