"""Digits are read wherever they are in a frame, and so is the direction in which they move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from diffc.errors import DiffcError
from diffc.models.embedded.digits_video import DIRECTIONS
from diffc.quality.motion import read_videos
from diffc.quality.videos import asked_videos, judge_videos
from tests import DATA
from tools.train.moving import STEPS, moving_prompts

FRAMES, PAPER = 9, 0.95


@pytest.fixture(scope="module")
def videos() -> tuple[Tensor, Tensor]:
    """50 videos [50, 9, 3, 32, 32] of digits that the classifier never saw, and what `asked_videos` asks."""
    stored = np.load(DATA / "digits.npz")
    asked = torch.tensor(asked_videos(50))
    pictures = torch.from_numpy(stored["images"][:, None] / 255.0).float()
    pictures = functional.interpolate(pictures, (20, 20), mode="bilinear")
    videos = torch.full((50, FRAMES, 3, 32, 32), PAPER)
    for video, (digit, direction) in zip(videos, asked.tolist(), strict=True):
        picture = pictures[np.flatnonzero(stored["digits"] == digit)[direction]]
        for frame in range(FRAMES):
            column, row = (6 + round(5 * step * (frame - 4) / 4) for step in STEPS[direction])
            video[frame, :, row : row + 20, column : column + 20] = picture
    return videos, asked


def test_digit_and_direction_of_real_digits(videos: tuple[Tensor, Tensor]) -> None:
    frames, asked = videos
    digits, directions = read_videos(frames)
    assert digits.shape == (50, FRAMES)
    assert (digits == asked[:, :1]).float().mean() >= 0.93
    assert torch.equal(directions, asked[:, 1])
    backwards = read_videos(frames.flip(1))[1]
    opposite = torch.tensor([DIRECTIONS.index(d) for d in ("still", "left", "right", "down", "up")])
    assert torch.equal(backwards, opposite[asked[:, 1]])


def test_figures_of_videos(videos: tuple[Tensor, Tensor]) -> None:
    frames = videos[0][:10]
    same, still = judge_videos(frames, frames), judge_videos(frames[:, :1].expand_as(frames), frames)
    assert (same.psnr, same.moved) == (float("inf"), 1.0)
    assert same.ssim == pytest.approx(1.0)
    assert still.moved == pytest.approx(0.2)
    assert still.ssim < 0.9
    damaged = frames.clone()
    damaged[0, 3, 0, 0, 0] = float("nan")
    figures = judge_videos(damaged, frames)
    assert figures.right == pytest.approx(same.right - 1 / 90)
    assert figures.moved == pytest.approx(1 - 1 / 10)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 2, 3, 32, 32), (2, 9, 1, 32, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DiffcError, match="videos of digits are"):
        read_videos(torch.ones(shape))
    with pytest.raises(DiffcError, match="videos of"):
        judge_videos(torch.ones(shape), torch.ones(1))


def test_what_videos_are_asked_for() -> None:
    assert len(set(asked_videos(50))) == 50
    texts, kinds = moving_prompts()
    assert kinds.bincount().tolist() == [len(texts) // 50] * 50
    assert kinds[texts.index("a handwritten seven moving left")] == 10 * DIRECTIONS.index("left") + 7
