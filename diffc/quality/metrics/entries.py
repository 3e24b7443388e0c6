"""What is judged: prompts, and for each the pictures of several models, in the JSON of ModelOpt's evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffc.errors import DiffcError
from diffc.records import of_pass_error
from passes.base import PassError
from passes.files.bounded import parse_json, read_text

_FORM = '[{"prompt": "a fox", "images": {"MODEL": "fox.png", "OTHER": "fox-2.png"}}, ...]'


@dataclass(frozen=True)
class Entry:
    """A prompt, and the picture that each model has made of it."""

    prompt: str
    images: Mapping[str, Path]


def read_entries(path: Path) -> list[Entry]:
    """The entries of a JSON file: a list of objects with "prompt" and "images", a path for each name of a model.

    Paths are relative to the file. Raises DiffcError for another form, for a picture that is missing, and when one
    prompt has other models than the first: means over different prompts cannot be compared.
    """
    try:
        content = parse_json(read_text(path), path)
    except PassError as error:
        raise of_pass_error(error, f"write a JSON file: {_FORM}") from error
    if not isinstance(content, list) or not content:
        raise DiffcError(f"{path} is not a list of prompts", fix=f"write {_FORM}")
    entries = [_entry(path, number, item) for number, item in enumerate(content, 1)]
    for number, entry in enumerate(entries, 1):
        if entry.images.keys() != entries[0].images.keys():
            differing = sorted(entry.images.keys() ^ entries[0].images.keys())
            raise DiffcError(
                f"{path}: prompt {number} has other models than the first: {', '.join(differing)} is in one alone",
                fix="give every prompt a picture of every model",
            )
    return entries


def _entry(path: Path, number: int, item: object) -> Entry:
    prompt = item.get("prompt") if isinstance(item, dict) else None
    images = item.get("images") if isinstance(item, dict) else None
    if not isinstance(prompt, str) or not isinstance(images, dict) or not images:
        raise DiffcError(f'{path}: entry {number} has no "prompt" and "images"', fix=f"write {_FORM}")
    found = {}
    for name, file in images.items():
        found[name] = path.parent / str(file)
        if not found[name].is_file():
            raise DiffcError(
                f"{path}: the picture of {name!r} for prompt {number} is missing: {found[name]}",
                fix="paths are relative to the JSON file",
            )
    return Entry(prompt, found)


def models_of(entries: Sequence[Entry]) -> list[str]:
    """The names of the models, in the order of the first entry."""
    return list(entries[0].images)


def opened(path: Path) -> Image.Image:
    """A picture in RGB. Raises DiffcError when the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DiffcError(
            f"cannot read the picture {path}: {error}", fix="take it out, or make it again"
        ) from error


def as_tensor(image: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0..1, float32."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
