"""Trains the embedded models digits-sd3, digits-flux and digits-sdxl and the reader that scores them.

    python -m tools.train.embedded [--parts reader clip_l clip_g vae16 vae4 sd3 flux sdxl] [--device cuda]
                                     [--effort 1.0] [--sheet FOLDER]

Needs scikit-learn (`pip install -e .[train]`), whose digits are the data. The first five parts are what the backbones
build on; parts may otherwise be trained side by side. Each writes safetensors and its log to
diffc/models/embedded/data/digits; a backbone's log ends with how many of 200 images the reader reads as asked.
--effort scales the number of steps. Every seed is fixed: the CPU gives the same weights again on the same machine, a
GPU the same up to the order of its sums.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffc.models.embedded import digits
from diffc.quality.classifier import WEIGHTS, score
from tools.train.backbones import Trainer
from tools.train.parts import train_classifier, train_clip, train_vae

STEPS = {
    "reader": 3000,
    "clip_l": 8000,
    "clip_g": 8000,
    "vae16": 4000,
    "vae4": 4000,
    "sd3": 10000,
    "flux": 10000,
    "sdxl": 6000,
}
SHARED = ("reader", "clip_l", "clip_g", "vae16", "vae4")
IMAGES, SAMPLING_STEPS = 200, 25


class Log:
    """Prints lines with the seconds since the start, and keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        path.write_text("", encoding="utf-8")

    def __call__(self, line: str) -> None:
        """Take one line."""
        text = f"{time.monotonic() - self.start:7.1f} s  {line}"
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def main() -> int:
    """Train the parts asked for, in their order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--effort", type=float, default=1.0, help="scales every number of steps")
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of samples of each model (PNG)")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    device = torch.device(options.device)
    digits.DATA.mkdir(parents=True, exist_ok=True)
    for part in (part for part in STEPS if part in options.parts):
        steps = max(40, round(STEPS[part] * options.effort))
        log = Log(digits.DATA / f"{part}.log")
        log(f"{part}: {steps} steps, torch {torch.__version__} on {_describe(device)}")
        if part in SHARED:
            shared(part, device, steps, log)
        else:
            backbone(f"digits-{part}", device, steps, log, options.sheet)
    return 0


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}"


def shared(part: str, device: torch.device, steps: int, log: Log) -> None:
    """Train and write one of the parts that the three pipelines and their score have in common."""
    if part == "reader":
        digits.save_weights(train_classifier(device, steps, log), WEIGHTS, torch.float32)
        return
    if part.startswith("clip"):
        module = train_clip(part, device, steps, log)
    else:
        module = train_vae(int(part.removeprefix("vae")), device, steps, log)
    digits.save_weights(module, digits.DATA / f"{part}.safetensors", torch.float16)


def backbone(name: str, device: torch.device, steps: int, log: Log, sheet: Path | None) -> None:
    """Train, write and score one backbone; what is scored was read back from the 16-bit file."""
    pipeline = digits.untrained(name)
    for part, module in digits.trained_parts(pipeline).items():
        digits.load_weights(module, digits.DATA / f"{part}.safetensors")
    pipeline.to(device)
    model = getattr(pipeline, digits.BACKBONES[name])
    log(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights")
    Trainer(name, pipeline, model, device, log).train(steps)
    dtype = torch.bfloat16 if name == "digits-flux" else torch.float16
    path = digits.DATA / f"{name}.safetensors"
    digits.save_weights(model, path, dtype)
    digits.load_weights(model, path)
    log(f"{path.name}: {path.stat().st_size:,} bytes")
    images = paint(pipeline)
    log(f"{name}: {score(images, asked()):.1%} of {IMAGES} images read as asked, {SAMPLING_STEPS} steps")
    for digit in range(10):
        share = score(images[digit::10], [digit] * len(images[digit::10]))
        log(f"{name}: {share:.0%} of {digits.prompt(digit)!r}")
    if sheet is not None:
        write_sheet(images, sheet / f"{name}.png")


def asked() -> list[int]:
    """The digits of the images that are scored: every digit in turn."""
    return [i % 10 for i in range(IMAGES)]


def paint(pipeline: Any) -> Any:
    """One image for each of `asked()`, [N, 64, 64, 3] in 0..1; image i from noise seeded with i."""
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, IMAGES, 50):
        batch = range(start, min(start + 50, IMAGES))
        batches.append(
            pipeline(
                [digits.prompt(asked()[i]) for i in batch],
                height=digits.PIXELS,
                width=digits.PIXELS,
                num_inference_steps=SAMPLING_STEPS,
                generator=[torch.Generator().manual_seed(i) for i in batch],
                output_type="np",
            ).images
        )
    return np.concatenate(batches)


def write_sheet(images: Any, path: Path) -> None:
    """Four rows of the ten digits."""
    from PIL import Image

    rows = [np.concatenate(images[i : i + 10], axis=1) for i in range(0, 40, 10)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.concatenate(rows) * 255).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    raise SystemExit(main())
