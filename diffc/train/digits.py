"""scikit-learn's digits as pictures: ink on paper, turned and moved a little, and prompts that name them.

The trained embedded models have learned from these (`tools/train`); here they are the data of `--data digits`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffc.models.embedded.digits import PIXELS, WORDS

PAPER = (0.96, 0.95, 0.91)
INK = (0.08, 0.11, 0.33)
EDGE, SHARPNESS = 0.45, 10.0  # of the stroke that is cut from the blurred enlargement
ROOM = 1.25  # the 8 x 8 bitmaps have no margin
TURN, SHEAR, ZOOM, SHIFT = math.radians(8), 0.08, 0.08, 0.06

TEMPLATES = (
    "a handwritten {}",
    "handwritten {}",
    "{}",
    "a {}",
    "the digit {}",
    "the number {}",
    "a handwritten digit {}",
    "a photo of a handwritten {}",
    "a drawing of the number {}",
    "the number {} written by hand",
    "a scan of a handwritten {} on paper",
    "a {} in blue ink",
)


@dataclass(frozen=True)
class Digits:
    """Bitmaps [N, 1, 8, 8] in 0..1 and the digits they show, [N]."""

    bitmaps: Tensor
    labels: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` images [count, 3, 64, 64] in 0..1, each turned and moved a little, and their digits."""
        device = self.bitmaps.device
        chosen = torch.randint(len(self.labels), (count,), generator=generator, device=device)
        return render(self.bitmaps[chosen], random_affine(count, generator, device)), self.labels[chosen]

    def plain(self) -> tuple[Tensor, Tensor]:
        """Every image, as it is, and its digit."""
        straight = torch.eye(2, 3, device=self.bitmaps.device).repeat(len(self.labels), 1, 1)
        return render(self.bitmaps, straight), self.labels


def load(half: int, device: torch.device) -> Digits:
    """Every second image of scikit-learn's 1797: half 0 is the classifier's, half 1 the pipelines'."""
    from sklearn.datasets import load_digits

    data = load_digits()
    bitmaps = torch.tensor(data.images[half::2] / 16.0, dtype=torch.float32, device=device)
    return Digits(bitmaps[:, None], torch.tensor(data.target[half::2], device=device))


def render(bitmaps: Tensor, affine: Tensor) -> Tensor:
    """[N, 1, 8, 8] and affine maps [N, 2, 3] to images [N, 3, 64, 64] in 0..1: enlarged, sharpened, in ink."""
    grid = functional.affine_grid(affine * ROOM, [len(bitmaps), 1, PIXELS, PIXELS], align_corners=False)
    smooth = functional.grid_sample(bitmaps, grid, mode="bicubic", align_corners=False)
    stroke = torch.sigmoid(SHARPNESS * (smooth - EDGE))
    paper, ink = (torch.tensor(c, device=bitmaps.device).reshape(1, 3, 1, 1) for c in (PAPER, INK))
    return paper + (ink - paper) * stroke


def random_affine(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Random small turns, shears, zooms and shifts, [count, 2, 3]."""
    u = torch.rand(6, count, generator=generator, device=device) * 2 - 1
    turn, shear = TURN * u[0], SHEAR * u[1]
    wide, high = 1 + ZOOM * u[2], 1 + ZOOM * u[3]
    rows = (
        torch.stack([wide * turn.cos(), -turn.sin() + shear, SHIFT * u[4]], dim=-1),
        torch.stack([turn.sin(), high * turn.cos(), SHIFT * u[5]], dim=-1),
    )
    return torch.stack(rows, dim=1)


def prompts() -> tuple[list[str], Tensor]:
    """The prompts that backbones learn, words and numerals, with the digit of each."""
    pairs = [
        (template.format(name), digit)
        for template in TEMPLATES
        for digit in range(10)
        for name in (WORDS[digit], str(digit))
    ]
    return [text for text, _ in pairs], torch.tensor([digit for _, digit in pairs])


def digit_pictures(count: int, pixels: int, seed: int) -> Iterator[tuple[Tensor, str]]:
    """`count` pictures [3, pixels, pixels] in 0..1 of the digits that the classifier never saw, each with a prompt."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = load(1, torch.device("cpu")).draw(count, generator)
    if pixels != PIXELS:
        images = functional.interpolate(images, (pixels, pixels), mode="bicubic", antialias=True).clamp(0, 1)
    texts, digits = prompts()
    by_digit = [[text for text, digit in zip(texts, digits, strict=True) if digit == d] for d in range(10)]
    for image, label in zip(images, labels, strict=True):
        some = by_digit[int(label)]
        yield image, some[int(torch.randint(len(some), (1,), generator=generator))]
