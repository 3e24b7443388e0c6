"""Compares pictures in numbers, and puts them side by side in one image with captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffc.errors import DiffcError
from diffc.output_files import check_output_file
from passes.files.atomic import written

ANIMATED = (".gif", ".webp")
"""Endings of files in which frames follow each other."""
_FRAME_MS = 60
_GAP, _LINE, _FONT, _CELL = 12, 18, 14, 192  # pixels; small images are enlarged to _CELL


@dataclass(frozen=True)
class Column:
    """One variant: its images [N, 3, H, W] in 0..1, and the lines above them."""

    images: Tensor
    captions: tuple[str, ...]


def check_alike(what: str, images: Tensor, reference: Tensor) -> None:
    """Raise DiffcError where two stacks of `what` that are compared have different shapes."""
    if images.shape != reference.shape:
        raise DiffcError(
            f"{what} of {tuple(images.shape)} and {tuple(reference.shape)}", fix="paint both alike"
        )


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels in 0..1 (infinite for equal images)."""
    error = float(torch.mean((images.double() - reference.double()) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def ssim(images: Tensor, reference: Tensor) -> float:
    """Mean structural similarity (Wang et al. 2004: Gaussian window, sigma 1.5) of [N, 3, H, W] in 0..1."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    likeness = structural_similarity_index_measure(images.float(), reference.float(), data_range=1.0)
    assert isinstance(likeness, Tensor)  # a tuple only where the whole map is asked for
    return float(likeness)


def montage(columns: Sequence[Column]) -> Image.Image:
    """All columns beside each other, image n of each in row n, captions on top. The images have one size."""
    _, _, height, width = columns[0].images.shape
    factor = max(1, -(-_CELL // width))
    font = ImageFont.load_default(_FONT)
    texts = [font.getlength(line) for column in columns for line in column.captions]
    cell, rows = int(max(width * factor, *texts)), len(columns[0].images)
    top = _GAP + _LINE * max(len(column.captions) for column in columns)
    size = _GAP + (cell + _GAP) * len(columns), top + (height * factor + _GAP) * rows + _GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, column in zip(range(_GAP, size[0], cell + _GAP), columns, strict=False):
        for row, line in enumerate(column.captions):
            draw.text((x, _GAP + row * _LINE), line, fill="black", font=font)
        for row, pixels in enumerate(column.images):
            picture = to_image(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, top + _GAP + row * (height * factor + _GAP)))
    return sheet


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 as an 8-bit RGB image."""
    values = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; the file appears under its name when it is whole. Raises DiffcError where it cannot be."""
    _save(path, lambda file: image.save(file, format="PNG"))


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as an animated GIF or WebP, by the ending of `path`, whole or not at all. Raises DiffcError."""
    kind = path.suffix[1:].upper()
    options: dict[str, Any] = {"save_all": True, "duration": _FRAME_MS, "loop": 0}
    options |= {"lossless": True} if kind == "WEBP" else {}
    _save(path, lambda file: frames[0].save(file, format=kind, append_images=frames[1:], **options))


def _save(path: Path, write: Callable[[Any], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_output_file(path)
        with written(path) as file:
            write(file)
    except OSError as error:
        raise DiffcError(f"cannot write {path}: {error.strerror}", fix="choose another -o") from error
