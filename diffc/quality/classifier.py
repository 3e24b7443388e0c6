"""Reads the digit in an image: the share that is read as asked is the quality figure of the `digits-*` models.

A small convolutional network, trained on one half of scikit-learn's digits (`tools/train/embedded.py`); the pipelines
learned from the other half, so it reads handwriting that it never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffc.errors import DiffcError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

WEIGHTS = Path(__file__).parents[1] / "models" / "embedded" / "data" / "digits" / "classifier.safetensors"
SIDE = 16  # pixels of what the network sees


class DigitReader(nn.Module):
    """Two convolutions and a matrix: [N, 3, H, W] in 0..1, at least 16 x 16 px, to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(32 * (SIDE // 4) ** 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten digits. Images are ink on paper: dark strokes on light ground."""
        ink = 1 - functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), SIDE)
        x = functional.max_pool2d(functional.relu(self.conv1(ink)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        logits: Tensor = self.out(self.drop(x.flatten(1)))
        return logits


def read_digits(images: Sequence[Image] | NDArray[np.floating] | Tensor) -> NDArray[np.float32]:
    """Logits [N, 10] of the digits 0 to 9.

    `images`: what a diffusers pipeline returns as "pil" (RGB), "np" ([N, H, W, 3] in 0..1) or "pt" ([N, 3, H, W] in
    0..1). Raises DiffcError for another shape.
    """
    pixels = _pixels(images)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < SIDE:
        raise DiffcError(
            f"digits are read from RGB images of at least {SIDE} px, not from {tuple(pixels.shape)}",
            fix='give the images of a pipeline called with output_type="np", "pt" or "pil"',
        )
    with torch.no_grad():
        logits: NDArray[np.float32] = _reader()(pixels).numpy()
    return logits


def score(images: Sequence[Image] | NDArray[np.floating] | Tensor, digits: Sequence[int]) -> float:
    """Share (0..1) of `images` that are read as the digit asked for; see `read_digits` for the images.

    An image of NaN is read as nothing. Raises DiffcError when there are not as many digits as images, or none.
    """
    logits = read_digits(images)
    if len(logits) != len(digits) or not len(digits):
        raise DiffcError(
            f"{len(logits)} images and {len(digits)} digits", fix="give one digit for each image"
        )
    right = (logits.argmax(axis=1) == np.asarray(digits)) & np.isfinite(logits).all(axis=1)
    return float(right.mean())


def _pixels(images: Sequence[Image] | NDArray[np.floating] | Tensor) -> Tensor:
    """As float32 [N, 3, H, W] in 0..1."""
    if isinstance(images, Tensor):
        return images.detach().float().cpu()
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images.astype(np.float32)).movedim(-1, 1)
    stacked = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(stacked / 255).movedim(-1, 1)


@lru_cache(maxsize=1)
def _reader() -> DigitReader:
    """The trained network, in evaluation mode."""
    from safetensors.torch import load_file

    reader = DigitReader()
    reader.load_state_dict(load_file(WEIGHTS))
    return reader.eval()
