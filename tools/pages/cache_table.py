"""Caching against fewer steps on the trained models: speed, what reads as asked, PSNR; and the same in FP8.

    python -m tools.pages.cache_table [--models digits-sd3 ...] [--variants blocks:every=2 12 ...] [--write docs]

A variant is a plan of `diffc cache list` or a number of steps. `operations`: how many times fewer floating-point
operations the backbone has, as torch counts them. `time`: how many times less processor time the pipeline takes, in
torch on one core, the least of --rounds in which the variants take turns, on 10 images. FP8: the backbone quantized as
a compile does it, in torch; `alone` is the PSNR that its error and that of caching would have together if they had
nothing to do with each other. --write puts a picture of the rows of each model there.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffc import cache
from diffc.compile.plan import check
from diffc.compile.quantize import calibrated
from diffc.compile.request import CompileRequest
from diffc.models.embedded.digits import BACKBONES, PIXELS, prompt
from diffc.models.sources.backbone import FakeBackbone
from diffc.progress import Silent
from diffc.quality.painting import Figures, judge, load_pipeline, paint
from diffc.quality.strips import decode, encode, sheet
from diffc.quantize.simulate import cpu_block_quant
from diffc.validate.torch_reference import TorchReference

VARIANTS = {
    "digits-sd3": ("blocks:first=0,every=2", "12", "modelopt-sd3", "blocks:first=0,every=3", "10"),
    "digits-flux": ("blocks:every=2", "12", "blocks:first=0,last=0,every=2", "10"),
    "digits-sdxl": ("tgate:step=8", "13", "deepcache:every=2", "12", "modelopt-sdxl", "10"),
}
CALIBRATION_SEED = 10_000  # noise that no picture of the table starts from


@dataclass(frozen=True)
class Row:
    """A variant: operations of the backbone, seconds of the pipeline, figures without quantization and in FP8."""

    name: str
    operations: int
    seconds: float
    plain: Figures
    fp8: Figures
    strips: tuple[str, str]


def main() -> None:
    """Print a table for every model, and write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help="cache plans and numbers of steps")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="steps of the full run and the plans")
    parser.add_argument("--rounds", type=int, default=3, help="in which time is taken")
    parser.add_argument("--write", type=Path, help="a folder for cache-MODEL.png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.models:
        rows = table(model, given.variants or VARIANTS[model], given.images, given.steps, given.rounds)
        print_table(model, rows)
        if given.write:
            picture(rows).save(given.write / f"cache-{model}.png", optimize=True)


def table(model: str, variants: tuple[str, ...], count: int, steps: int, rounds: int) -> list[Row]:
    """The full run, then each variant."""
    pipe, component = load_pipeline(model), BACKBONES[model]
    took: dict[str, list[float]] = {variant: [] for variant in ("", *variants)}
    for _ in range(rounds):
        for variant, seconds in took.items():
            seconds.append(run(pipe, variant, 10, steps)[1])
    backbones = [getattr(pipe, component), quantized(model)]
    rows: list[Row] = []
    reference = None
    for variant in took:
        images = []
        for backbone in backbones:
            setattr(pipe, component, backbone)
            images.append(run(pipe, variant, count, steps)[0])
        reference = images[0] if reference is None else reference
        plain, fp8 = (judge(found, reference) for found in images)
        name = f"{steps} steps" if not variant else f"{variant} steps" if variant.isdigit() else variant
        strips = encode(images[0][:10]), encode(images[1][:10])
        setattr(pipe, component, backbones[0])
        counted = operations(pipe, backbones[0], variant, steps)
        rows.append(Row(name, counted, min(took[variant]), plain, fp8, strips))
    return rows


def quantized(model: str) -> Any:
    """The backbone in FP8 as a compile calibrates it, in float32 around the quantizers."""
    request = CompileRequest(
        model,
        Path("unwritten"),
        "fp8",
        dtype="float32",
        prompts=tuple(prompt(digit) for digit in range(10)),
        steps=5,
        batch_size=10,
        image_size=PIXELS,
        seed=CALIBRATION_SEED,
        force=True,
    )
    plan = check(request)
    return TorchReference(
        plan.source, plan.dtype, calibrated(plan, FakeBackbone(plan.source, plan.dtype), Silent())
    ).model


def run(pipe: Any, variant: str, count: int, steps: int) -> tuple[Tensor, float]:
    """Images [N, 3, H, W] in 0..1, image i from noise seeded with i, and the processor's seconds."""
    fewer = variant.isdigit()
    plan = cache.apply(pipe, variant) if variant and not fewer else nullcontext()
    with plan, cpu_block_quant():
        started = time.process_time()
        images = paint(pipe, count, steps=int(variant) if fewer else steps, batch=count)
        return images, time.process_time() - started


def operations(pipe: Any, backbone: nn.Module, variant: str, steps: int) -> int:
    """Floating-point operations of the backbone for one image, in all steps."""
    total = 0
    counter: Any = FlopCounterMode(display=False)  # its methods have no types

    def start(*_: Any) -> None:
        counter.__enter__()

    def stop(*_: Any) -> None:
        nonlocal total
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    handles = [backbone.register_forward_pre_hook(start), backbone.register_forward_hook(stop)]
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count the CPU's own kernel
        run(pipe, variant, 1, steps)
    for handle in handles:
        handle.remove()
    return total


def print_table(model: str, rows: list[Row]) -> None:
    """Markdown."""
    heads = [model, "operations", "time", "read as asked", "PSNR", "FP8: read", "PSNR", "alone"]
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for row in rows:
        figures = [
            f"{rows[0].operations / row.operations:.2f}",
            f"{rows[0].seconds / row.seconds:.2f}",
            f"{row.plain.right:.0%}",
            decibels(row.plain.psnr),
            f"{row.fp8.right:.0%}",
            decibels(row.fp8.psnr),
            decibels(together(row.plain.psnr, rows[0].fp8.psnr)),
        ]
        print(f"| `{row.name}` | {' | '.join(figures)} |", flush=True)


def decibels(value: float) -> str:
    """`38.2`; a dash for equal images."""
    return f"{value:.1f}" if math.isfinite(value) else "-"


def together(one: float, other: float) -> float:
    """The PSNR of two errors that have nothing to do with each other: their mean squares add up."""
    return -10 * math.log10(10 ** (-one / 10) + 10 ** (-other / 10))


def picture(rows: list[Row]) -> Any:
    """Ten digits of every row, without quantization and in FP8."""
    named = [(row.name, decode(row.strips[0])) for row in rows]
    return sheet(named + [(f"FP8, {row.name}", decode(row.strips[1])) for row in rows])


if __name__ == "__main__":
    main()
