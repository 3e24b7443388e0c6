"""Samples of a trained backbone, read by the reader of digits: the figures in its log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffc.models.embedded import digits
from diffc.models.embedded.digits_video import DIRECTIONS
from diffc.quality.classifier import score
from diffc.quality.motion import read_videos
from diffc.quality.videos import asked_videos, paint_videos

IMAGES, VIDEOS, SAMPLING_STEPS = 200, 200, 25
Log = Callable[[str], None]


def score_images(name: str, pipeline: Any, log: Log, sheet: Path | None) -> None:
    """Log how many of 200 images are read as asked; write four rows of the ten digits to the folder `sheet`."""
    images = paint(pipeline)
    log(f"{name}: {score(images, asked()):.1%} of {IMAGES} images read as asked, {SAMPLING_STEPS} steps")
    for digit in range(10):
        share = score(images[digit::10], [digit] * len(images[digit::10]))
        log(f"{name}: {share:.0%} of {digits.prompt(digit)!r}")
    if sheet is not None:
        write_sheet([np.concatenate(images[i : i + 10], axis=1) for i in range(0, 40, 10)], sheet, name)


def score_videos(pipeline: Any, log: Log, sheet: Path | None) -> None:
    """Log how many frames of 200 videos are read as asked, and how many videos move so; write ten to `sheet`."""
    pipeline.set_progress_bar_config(disable=True)
    videos = paint_videos(pipeline, VIDEOS, steps=SAMPLING_STEPS, batch=50)
    wanted = torch.tensor(asked_videos(VIDEOS))
    read, directions = read_videos(videos)
    right, moved = (read == wanted[:, :1]).float(), (directions == wanted[:, 1]).float()
    log(f"digits-video: {right.mean():.1%} of {right.numel()} frames read as asked, {SAMPLING_STEPS} steps")
    log(f"digits-video: {moved.mean():.1%} of {VIDEOS} videos move as asked")
    for digit in range(10):
        log(f"digits-video: {right[wanted[:, 0] == digit].mean():.0%} of frames of {digits.prompt(digit)!r}")
    for number, direction in enumerate(DIRECTIONS):
        log(f"digits-video: {moved[wanted[:, 1] == number].mean():.0%} of videos for {direction!r}")
    if sheet is not None:
        rows = [np.concatenate(list(video.movedim(1, -1).numpy()), axis=1) for video in videos[:10]]
        write_sheet(rows, sheet, "digits-video")


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


def write_sheet(rows: list[Any], folder: Path, name: str) -> None:
    """Rows of pixels [H, W, 3] in 0..1, below each other, as NAME.png."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    pixels = (np.concatenate(rows) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
