"""Pictures in the page: painted now, or those that are there, with how near they are to the first of their row."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from diffc.commands.generate import TORCH, GenerateRequest, captions, generate
from diffc.errors import DiffcError
from diffc.progress import Reporter
from diffc.quality.metrics.entries import as_tensor, opened, read_entries
from diffc.quality.pictures import psnr, ssim, to_image
from diffc.report.request import ReportRequest
from passes.files.contained import why_outside

_SIDE, _SMALL, _EXACT = 640, 320, 128
"""Pixels: larger pictures are made smaller, those of a sweep the most, and small ones are kept without loss."""
ABOUT = 150
"""Pictures of a sweep that a page shows."""
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


def of_sweep(folder: Path, cells: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """What `diffc sweep --evaluate` has painted of `cells`, (model, cell): a row for each model and prompt.

    Pictures are those below `folder`/pictures; what is damaged or lies elsewhere is left out. At most ABOUT are shown.
    """
    rows: dict[tuple[str, str], dict[str, Path]] = {}
    for model, cell in cells:
        for prompt, images in _painted_for(folder, cell):
            row = rows.setdefault((model, prompt), {})
            row |= {TORCH if name == TORCH else cell: path for name, path in images.items()}
    shown: list[dict[str, Any]] = []
    for (model, prompt), images in rows.items():
        if shown and sum(len(row["pictures"]) for row in shown) + len(images) > ABOUT:
            break
        with suppress(DiffcError):
            shown.append(
                {"prompt": f"{model}: {prompt}", "pictures": list(_row(list(images.items()), _SMALL))}
            )
    return shown


def _painted_for(folder: Path, cell: str) -> Iterator[tuple[str, Mapping[str, Path]]]:
    """The prompts of a cell, each with its pictures by name, torch's first."""
    if why_outside(folder, f"pictures/{cell}/pictures.json"):
        return
    home = folder / "pictures" / cell
    try:
        entries = read_entries(home / "pictures.json")
    except DiffcError:
        return
    for entry in entries:
        if all(_inside(home, path) for path in entry.images.values()):
            order = sorted(entry.images.items(), key=lambda item: item[0] != TORCH)
            yield entry.prompt, dict(order)


def _inside(home: Path, path: Path) -> bool:
    return path.is_relative_to(home) and not why_outside(home, path.relative_to(home).as_posix())


def _row(images: Sequence[tuple[str, Path]], side: int = _SIDE) -> Iterator[dict[str, Any]]:
    first = opened(images[0][1])
    for name, path in images:
        image = opened(path)
        figures = []
        if path != images[0][1] and image.size == first.size:
            pixels, reference = as_tensor(image), as_tensor(first)
            figures = [f"PSNR {psnr(pixels, reference):.1f} dB, SSIM {ssim(pixels, reference):.3f}"]
        yield _picture(name, image, figures, side)


def _picture(name: str, image: Image.Image, figures: Sequence[str], side: int = _SIDE) -> dict[str, Any]:
    """A picture as the page holds it: small ones as PNG, large ones as WebP of at most `side` pixels."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
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
