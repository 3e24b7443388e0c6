"""Videos for the quality figures: every digit in every direction, from the same noise whatever the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffc.errors import DiffcError
from diffc.models.embedded.digits_video import DIRECTIONS, FRAMES, PIXELS, prompt
from diffc.quality.motion import read_videos
from diffc.quality.pictures import check_alike, psnr, ssim

TOKENS = 64
"""Text length: no prompt here is longer, and the pipeline's own 128 are mostly padding."""


@dataclass(frozen=True)
class VideoFigures:
    """Figures of videos: `right` is the share (0..1) of frames that are read as the digit asked for.

    `moved` is the share of videos that move as asked. `psnr` (dB, infinite for equal videos) is the mean over the
    videos, `ssim` likewise over frames, both against the videos of the unquantized torch model.
    """

    right: float
    moved: float
    psnr: float
    ssim: float


def asked_videos(count: int) -> list[tuple[int, int]]:
    """Digit and number of the direction of `count` videos: fifty of them ask for each digit in each direction."""
    return [(n % 10, (n + n // 10) % len(DIRECTIONS)) for n in range(count)]


def paint_videos(pipe: Any, count: int, *, steps: int, batch: int) -> Tensor:
    """One video for each of `asked_videos(count)`, [count, frames, 3, 32, 32] in 0..1; video i from noise of seed i.

    Guidance is the pipeline's own. `batch` changes how much is painted at a time and no noise. Raises DiffcError
    for a count, steps or a batch below 1.
    """
    for name, value in (("videos", count), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise DiffcError(f"{name} is {value}", fix="give at least 1")
    asked = list(enumerate(asked_videos(count)))
    return torch.cat([_paint(pipe, asked[i : i + batch], steps) for i in range(0, count, batch)])


def _paint(pipe: Any, asked: Sequence[tuple[int, tuple[int, int]]], steps: int) -> Tensor:
    videos: Tensor = pipe(
        [prompt(*what) for _, what in asked],
        height=PIXELS,
        width=PIXELS,
        num_frames=FRAMES,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(number) for number, _ in asked],
        max_sequence_length=TOKENS,
        output_type="pt",
    ).frames
    return videos.float().cpu()


def judge_videos(videos: Tensor, reference: Tensor) -> VideoFigures:
    """Figures of `videos` [N, frames, 3, H, W] in 0..1, of `asked_videos(N)`, against `reference` of the same shape.

    Raises DiffcError for another shape. A video with NaN counts as 0 dB, SSIM 0.
    """
    check_alike("videos", videos, reference)
    digits, directions = read_videos(videos)
    asked = torch.tensor(asked_videos(len(videos)))
    pairs = [
        (video, other)
        for video, other, direction in zip(videos, reference, directions, strict=True)
        if direction >= 0
    ]
    return VideoFigures(
        float((digits == asked[:, :1]).float().mean()),
        float((directions == asked[:, 1]).float().mean()),
        sum(psnr(*pair) for pair in pairs) / len(videos),
        sum(ssim(*pair) for pair in pairs) / len(videos),
    )
