"""Pictures in the page: painted now, or those that are there, with how near they are to the first of their row."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from diffc.commands.generate import TORCH, GenerateRequest, captions, generate
from diffc.progress import Reporter
from diffc.quality.metrics.entries import as_tensor, opened, read_entries
from diffc.quality.pictures import psnr, ssim, to_image
from diffc.report.request import ReportRequest

_SIDE, _EXACT = 640, 128
"""Pixels: larger pictures are made smaller for the page, and smaller ones are kept without loss."""
MOST = 12
"""Rows of pictures in a page."""


def painted(request: ReportRequest, ui: Reporter) -> list[dict[str, Any]]:
    """A row of pictures for each prompt: torch, the artifact, and the one that it stands against."""
    return [_painted(request, prompt, ui) for prompt in request.paint]


def paint_request(request: ReportRequest, prompt: str, output: Path) -> GenerateRequest:
    """What `diffc generate` is asked for."""
    beside = () if request.against is None else (str(request.against),)
    return GenerateRequest(
        request.what,
        output,
        prompt,
        compare=(TORCH, *beside),
        steps=request.steps,
        seed=request.seed,
        height=request.size,
        width=request.size,
        pipeline=request.pipeline,
        warm_up=False,
        hub=request.hub,
    )


def _painted(request: ReportRequest, prompt: str, ui: Reporter) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="diffc-") as folder:
        variants = generate(paint_request(request, prompt, Path(folder) / "beside.png"), ui)
    found = [
        _picture(variant.name, to_image(variant.images[0]), captions(variant)[1:]) for variant in variants
    ]
    return {"prompt": prompt, "pictures": found, "psnr": [variant.psnr for variant in variants]}


def mean_psnr(rows: Sequence[Mapping[str, Any]], place: int) -> dict[str, float]:
    """The mean PSNR to torch of the pictures in column `place` of painted rows; empty without any."""
    values = [row["psnr"][place] for row in rows]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return {"PSNR to torch, dB": sum(finite) / len(finite)} if finite else {}


def given(path: Path) -> list[dict[str, Any]]:
    """The pictures that a JSON of `diffc evaluate` names, of MOST prompts. Raises DiffcError for a missing one."""
    return [
        {"prompt": entry.prompt, "pictures": list(_row(list(entry.images.items())))}
        for entry in read_entries(path)[:MOST]
    ]


def _row(images: Sequence[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    first = opened(images[0][1])
    for name, path in images:
        image = opened(path)
        figures = []
        if path != images[0][1] and image.size == first.size:
            pixels, reference = as_tensor(image), as_tensor(first)
            figures = [f"PSNR {psnr(pixels, reference):.1f} dB, SSIM {ssim(pixels, reference):.3f}"]
        yield _picture(name, image, figures)


def _picture(name: str, image: Image.Image, figures: Sequence[str]) -> dict[str, Any]:
    """A picture as the page holds it: small ones as PNG, large ones as WebP of at most _SIDE pixels."""
    image = image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    kind = "png" if max(image.size) <= _EXACT else "webp"
    file = BytesIO()
    image.save(file, format=kind.upper(), **({"quality": 88} if kind == "webp" else {"optimize": True}))
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return {
        "name": name,
        "data": data,
        "width": image.width,
        "height": image.height,
        "figures": list(figures),
    }
