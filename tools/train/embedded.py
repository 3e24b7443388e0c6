"""Trains the embedded models digits-sd3, -flux, -sdxl, -sd15 and -video and the reader that scores them.

    python -m tools.train.embedded [--parts reader clip_l clip_g vae16 vae4 t5_video vae_video sd3 flux sdxl sd15 video]
                                     [--device cuda] [--effort 1.0] [--minutes M] [--data FOLDER] [--sheet FOLDER]

Needs scikit-learn (`pip install -e .[train]`), whose digits are the data. The first seven parts are what the backbones
build on; parts may otherwise be trained side by side. Each writes safetensors and its log to --data
(diffc/models/embedded/data/digits); a backbone's log ends with how many of 200 images the reader reads as asked.
--effort scales the number of steps, --minutes takes fewer where all parts would not be done by then. Every seed is
fixed: the CPU gives the same weights again on the same machine, a GPU the same up to the order of its sums.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffc.models.embedded import digits
from diffc.quality.classifier import WEIGHTS
from tools.train.backbones import Trainer
from tools.train.parts import train_classifier, train_clip, train_vae
from tools.train.scoring import score_images, score_videos
from tools.train.video_parts import train_t5, train_video_vae

STEPS = {
    "reader": 3000,
    "clip_l": 8000,
    "clip_g": 8000,
    "vae16": 4000,
    "vae4": 4000,
    "t5_video": 3000,
    "vae_video": 6000,
    "sd3": 10000,
    "flux": 10000,
    "sdxl": 6000,
    "sd15": 6000,
    "video": 15000,
}
SHARED = ("reader", "clip_l", "clip_g", "vae16", "vae4", "t5_video", "vae_video")
TRIALS = 40, 40, 200  # steps of the trainings that tell what a step takes
SCORING = 25.0  # seconds for the samples of a backbone


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
    options = _options()
    start = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    device, folder = torch.device(options.device), options.data
    folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in STEPS if part in options.parts]
    for number, part in enumerate(parts):
        steps = max(40, round(STEPS[part] * options.effort))
        if options.minutes:
            share = STEPS[part] / sum(STEPS[later] for later in parts[number:])
            left = options.minutes * 60 - SCORING - (time.monotonic() - start)
            steps = affordable(part, folder, device, steps, left * share)
        log = Log(folder / f"{part}.log")
        log(f"{part}: {steps} steps, torch {torch.__version__} on {_describe(device)}")
        if part in SHARED:
            shared(part, folder, device, steps, log)
        else:
            backbone(f"digits-{part}", folder, device, steps, log, options.sheet)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--effort", type=float, default=1.0, help="scales every number of steps")
    parser.add_argument("--minutes", type=float, help="for all parts: fewer steps where they take longer")
    parser.add_argument("--data", type=Path, default=digits.DATA, help="folder of the weights and logs")
    parser.add_argument("--sheet", type=Path, help="folder for a sheet of samples of each model (PNG)")
    return parser.parse_args()


def affordable(part: str, folder: Path, device: torch.device, most: int, seconds: float) -> int:
    """How many steps of `part` take `seconds`, by the time of short trainings; `most` at most.

    The first one also loads and tunes libraries, and does not count.
    """
    times = []
    for steps in TRIALS:
        before = time.monotonic()
        _train(part, folder, device, steps, lambda line: None)
        times.append(time.monotonic() - before)
    _, short, long = times
    step = max((long - short) / (TRIALS[2] - TRIALS[1]), 0.2 * long / TRIALS[2])
    return max(TRIALS[1], min(most, int((seconds - sum(times) - short) / step)))


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}"


def shared(part: str, folder: Path, device: torch.device, steps: int, log: Log) -> None:
    """Train and write one of the parts that a backbone or the score builds on."""
    if part == "reader":
        digits.save_weights(train_classifier(device, steps, log), WEIGHTS, torch.float32)
        return
    digits.save_weights(
        _train(part, folder, device, steps, log), folder / f"{part}.safetensors", torch.float16
    )


def _train(part: str, folder: Path, device: torch.device, steps: int, log: Callable[[str], None]) -> Any:
    """What a part is in the end: a module, or for a backbone the pipeline around it."""
    if part == "reader":
        return train_classifier(device, steps, log)
    if part.startswith("clip"):
        return train_clip(part, device, steps, log)
    if part == "t5_video":
        return train_t5(device, steps, log)
    if part == "vae_video":
        return train_video_vae(device, steps, log)
    if part.startswith("vae"):
        return train_vae(int(part.removeprefix("vae")), device, steps, log)
    return _trained_backbone(f"digits-{part}", folder, device, steps, log)


def _trained_backbone(
    name: str, folder: Path, device: torch.device, steps: int, log: Callable[[str], None]
) -> Any:
    """The pipeline of that name on the device, its backbone trained around the parts in `folder`."""
    pipeline = digits.untrained(name)
    for part, module in digits.trained_parts(pipeline).items():
        digits.load_weights(module, weights_of(part, folder))
    pipeline.to(device)
    model = getattr(pipeline, digits.BACKBONES[name])
    log(f"{name}: {sum(p.numel() for p in model.parameters()):,} weights")
    Trainer(name, pipeline, model, device, log).train(steps)
    return pipeline


def weights_of(part: str, folder: Path) -> Path:
    """The file of a part: the one in `folder`, else the one of the package."""
    own = folder / f"{part}.safetensors"
    return own if own.is_file() else digits.DATA / own.name


def backbone(name: str, folder: Path, device: torch.device, steps: int, log: Log, sheet: Path | None) -> None:
    """Train, write and score one backbone; what is scored was read back from the 16-bit file."""
    pipeline = _trained_backbone(name, folder, device, steps, log)
    model = getattr(pipeline, digits.BACKBONES[name])
    dtype = torch.bfloat16 if name == "digits-flux" else torch.float16
    path = folder / f"{name}.safetensors"
    digits.save_weights(model, path, dtype)
    digits.load_weights(model, path)
    log(f"{path.name}: {path.stat().st_size:,} bytes")
    if name == "digits-video":
        score_videos(pipeline, log, sheet)
    else:
        score_images(name, pipeline, log, sheet)


if __name__ == "__main__":
    raise SystemExit(main())
