"""Rows of images as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffc.quality.pictures import to_image
from diffc.quality.strips import decode, encode, sheet
from tests import DATA


def digits_on_paper(count: int) -> Tensor:
    """Real handwriting, image i a digit i % 10, [count, 3, 64, 64]."""
    stored = np.load(DATA / "digits.npz")
    order = [np.flatnonzero(stored["digits"] == i % 10)[i // 10] for i in range(count)]
    grey = torch.from_numpy(stored["images"][order] / 255.0).float()
    return nn.functional.interpolate(grey[:, None], size=(64, 64)).expand(-1, 3, -1, -1).contiguous()


def test_strips_keep_the_pixels() -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    row = decode(encode(images))
    assert row.size == (192, 64)
    assert row.crop((64, 0, 128, 64)).tobytes() == to_image(images[1]).tobytes()
    ink = Image.new("RGB", (192, 64), (30, 40, 120))
    whole = sheet([("torch", ink), ("int8_smoothquant", ink)])
    assert whole.height == 2 * 64 + 4
    assert whole.convert("RGB").getpixel((whole.width - 1, 100)) == (30, 40, 120)


def row(cell: str, right: float, **more: Any) -> dict[str, Any]:
    strip = encode(digits_on_paper(10))
    base = {"model": "digits-sd3", "cell": cell, "error": "", "images": 100, "steps": 10, "keep": []}
    return base | {"right": right, "psnr": 30.0, "ssim": 0.9, "strip": strip} | more
