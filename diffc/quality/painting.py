"""Pictures for the quality figures: every digit in turn, from the same noise whatever the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from diffc.errors import DiffcError
from diffc.models.embedded import digits
from diffc.quality.classifier import read_digits
from diffc.quality.pictures import check_alike, psnr, ssim

TOKENS = 64
"""Text length of T5 in SD3 and FLUX: no prompt here is longer, and their own 256 and 512 are mostly padding."""


@dataclass(frozen=True)
class Figures:
    """Figures of images: `read` holds the digit that the classifier reads in each (-1 in an image of NaN).

    `right` is the share (0..1) that is read as asked; `psnr` (dB, infinite for equal images) is the mean over the
    images, `ssim` likewise, both against the images of the unquantized torch model.
    """

    read: tuple[int, ...]
    right: float
    psnr: float
    ssim: float


def asked(count: int) -> list[int]:
    """The digits of `count` images: 0 to 9, again and again."""
    return [number % 10 for number in range(count)]


def load_pipeline(name: str) -> Any:
    """The digits pipeline of that name in float32 on the CPU, as it was trained."""
    pipe = digits.build(name)
    pipe.set_progress_bar_config(disable=True)
    # Not pipe.to(): diffusers warns there of modules to keep in float32, and all others are in float32 already.
    torch.nn.Module.to(getattr(pipe, digits.BACKBONES[name]), torch.float32)
    return pipe


def paint(pipe: Any, count: int, *, steps: int, batch: int) -> Tensor:
    """One image for each of `asked(count)`, [count, 3, 64, 64] in 0..1, float32; image i from noise seeded with i.

    Guidance is the pipeline's own. `batch` changes how much is painted at a time and no noise. Raises DiffcError
    for a count, steps or a batch below 1.
    """
    for name, value in (("images", count), ("steps", steps), ("batch", batch)):
        if value < 1:
            raise DiffcError(f"{name} is {value}", fix="give at least 1")
    numbers = range(count)
    return torch.cat([_paint(pipe, numbers[i : i + batch], steps) for i in range(0, count, batch)])


def _paint(pipe: Any, numbers: Sequence[int], steps: int) -> Tensor:
    has_t5 = "max_sequence_length" in signature(pipe.__call__).parameters
    settings = {"max_sequence_length": TOKENS} if has_t5 else {}
    images: Tensor = pipe(
        [digits.prompt(number % 10) for number in numbers],
        height=digits.PIXELS,
        width=digits.PIXELS,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(number) for number in numbers],
        output_type="pt",
        **settings,
    ).images
    return images.float().cpu()


def judge(images: Tensor, reference: Tensor) -> Figures:
    """Figures of `images` [N, 3, H, W] in 0..1, of `asked(N)`, against `reference` of the same shape.

    Raises DiffcError for another shape. An image with NaN counts as 0 dB, SSIM 0.
    """
    check_alike("images", images, reference)
    whole = torch.isfinite(images).flatten(1).all(dim=1)
    numbers = read_digits(images.nan_to_num()).argmax(axis=1)
    read = tuple(int(number) if ok else -1 for number, ok in zip(numbers, whole, strict=True))
    right = sum(a == b for a, b in zip(read, asked(len(read)), strict=True)) / len(read)
    pairs = [(i[None], r[None]) for i, r, ok in zip(images, reference, whole, strict=True) if ok]
    return Figures(
        read,
        right,
        sum(psnr(i, r) for i, r in pairs) / len(read),
        sum(ssim(i, r) for i, r in pairs) / len(read),
    )
