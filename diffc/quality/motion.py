"""Reads videos of digits: the digit of every frame, wherever it is, and the direction in which it moves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffc.errors import DiffcError
from diffc.models.embedded.digits_video import DIRECTIONS
from diffc.quality.classifier import read_digits

_INK = 0.3
"""Darkness from which a pixel counts as ink: 0 is white, 1 black, and paper has less than 0.1."""
_WINDOW = 0.625
"""Side of what the classifier sees, as a share of a frame's: it learned from digits that fill 0.8 of what it sees."""
_PIXELS = 64
_LEAST = 2.5 / 32
"""Of a frame's width, between the first and the last third of a video: what moves less stands still."""


def centred(frames: Tensor) -> Tensor:
    """The part of each frame around its ink, [N, 3, 64, 64] in 0..1, of frames [N, 3, H, W] in 0..1."""
    middle = _middle(frames)
    grid = functional.affine_grid(
        torch.cat([_WINDOW * torch.eye(2).expand(len(frames), 2, 2), middle[..., None]], dim=-1),
        [len(frames), 3, _PIXELS, _PIXELS],
        align_corners=False,
    )
    return functional.grid_sample(frames.float(), grid, padding_mode="border", align_corners=False)


def _middle(frames: Tensor) -> Tensor:
    """Middle of the ink, [N, 2]: columns, then rows, each -1..1 from edge to edge; 0 where there is none."""
    ink = (1 - frames.float().mean(dim=1) - _INK).clamp(min=0)
    total = ink.sum(dim=(1, 2)).clamp(min=1e-6)
    places = [(torch.arange(n) + 0.5) * 2 / n - 1 for n in ink.shape[1:]]
    rows = (ink.sum(dim=2) * places[0]).sum(dim=1) / total
    columns = (ink.sum(dim=1) * places[1]).sum(dim=1) / total
    return torch.stack([columns, rows], dim=1)


def read_videos(videos: Tensor) -> tuple[Tensor, Tensor]:
    """The digit of every frame [N, frames] and the number of each video's direction in DIRECTIONS, [N].

    `videos` is what LTXPipeline returns as "pt": [N, frames, 3, H, W] in 0..1, three frames at least. A frame with NaN
    has the digit -1, and so has the direction of its video. Raises DiffcError for another shape.
    """
    if videos.ndim != 5 or videos.shape[1] < 3 or videos.shape[2] != 3:
        raise DiffcError(
            f"videos of digits are [N, frames, 3, H, W] with three frames or more, not {tuple(videos.shape)}",
            fix='give the frames of a pipeline called with output_type="pt"',
        )
    frames = videos.detach().float().cpu()
    whole = torch.isfinite(frames).flatten(2).all(dim=2)
    flat = frames.nan_to_num().flatten(0, 1)
    digits = torch.from_numpy(read_digits(centred(flat)).argmax(axis=1)).reshape(whole.shape)
    directions = _directions(_middle(flat).reshape(*whole.shape, 2))
    return digits.where(whole, torch.tensor(-1)), directions.where(whole.all(dim=1), torch.tensor(-1))


def _directions(middles: Tensor) -> Tensor:
    """Numbers in DIRECTIONS of the paths `middles` [N, frames, 2]."""
    third = middles.shape[1] // 3
    moved = (middles[:, -third:].mean(dim=1) - middles[:, :third].mean(dim=1)) / 2  # of a frame's width
    right, down = moved.unbind(dim=1)
    sideways = torch.where(right > 0, DIRECTIONS.index("right"), DIRECTIONS.index("left"))
    upright = torch.where(down > 0, DIRECTIONS.index("down"), DIRECTIONS.index("up"))
    found = torch.where(right.abs() > down.abs(), sideways, upright)
    return found.where(moved.abs().amax(dim=1) > _LEAST, torch.tensor(DIRECTIONS.index("still")))
