"""Reads a backbone folder as diffusers writes it: config.json beside safetensors files."""

from __future__ import annotations

from pathlib import Path

from diffc.models.registry import family_of
from diffc.models.sources.json_files import read_json
from diffc.models.sources.safetensors_files import folder_weights
from diffc.models.sources.source import ModelSource, Reader


def read_backbone(folder: Path, *, name: str, pipeline: Path | None) -> ModelSource:
    """The backbone in `folder`; its family is found before its weights are looked at, since that costs nothing.

    Raises UnsupportedError for a backbone of no known family, DiffcError for a folder that is not complete.
    """
    config = read_json(folder / "config.json")
    family = family_of(config, folder / "config.json")
    return ModelSource(name, folder, pipeline, config, family, folder_weights(folder))


def folder_of(model: str) -> Path:
    """MODEL as a path: the user's home folder filled in, absolute."""
    return Path(model).expanduser().absolute()


def _declines(model: str) -> str | None:
    folder = folder_of(model)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return None if (folder / "config.json").is_file() else f"{folder} has no config.json"


def _open(model: str) -> ModelSource:
    folder = folder_of(model)
    return read_backbone(folder, name=folder.name, pipeline=None)


READER = Reader("backbone folder", "a backbone folder (config.json, safetensors)", _declines, _open)
