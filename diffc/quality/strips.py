"""Rows of small images: stored as text between runs of a table, and assembled to one picture."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffc.quality.pictures import to_image

_GAP, _FONT, _COLORS = 4, 13, 128


def encode(images: Tensor) -> str:
    """[N, 3, H, W] in 0..1 beside each other, as a PNG in base64."""
    row = Image.fromarray(np.concatenate([np.asarray(to_image(i)) for i in images], axis=1))
    file = BytesIO()
    row.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def decode(text: str) -> Image.Image:
    """The row of `encode`."""
    image = Image.open(BytesIO(base64.b64decode(text)))
    image.load()
    return image


def sheet(rows: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """All rows below each other, each with its name on the left, in 128 colours: a small file."""
    font = ImageFont.load_default(_FONT)
    left = 2 * _GAP + int(max(font.getlength(name) for name, _ in rows)) + 1
    width, height = max(row.width for _, row in rows), max(row.height for _, row in rows)
    out = Image.new("RGB", (left + width, (height + _GAP) * len(rows) - _GAP), "white")
    draw = ImageDraw.Draw(out)
    for number, (name, row) in enumerate(rows):
        top = number * (height + _GAP)
        draw.text((_GAP, top + (height - _FONT) // 2), name, fill="black", font=font)
        out.paste(row, (left, top))
    return out.quantize(_COLORS, dither=Image.Dither.NONE)
