"""Reads a backbone folder as diffusers writes it: config.json beside safetensors files."""

from __future__ import annotations

from pathlib import Path

from diffc.models.registry import family_of
from diffc.models.sources.json_files import read_json
from diffc.models.sources.safetensors_files import file_names, folder_weights
from diffc.models.sources.source import ModelSource, Reader
from diffc.models.sources.weight_names import choose


def read_backbone(
    folder: Path, *, name: str, pipeline: Path | None, variant: str | None = None
) -> ModelSource:
    """The backbone in `folder`; its family is found before its weights are looked at, since that costs nothing.

    `variant` is that of the pipeline; None for a backbone alone takes plain files before any variant.
    Raises UnsupportedError for a backbone of no known family, DiffcError for a folder that is not complete.
    """
    config = read_json(folder / "config.json")
    family = family_of(config, folder / "config.json")
    weights = folder_weights(folder, variant)
    if pipeline is None:
        chosen = choose(file_names(folder), variant)
        variant = chosen.variant if chosen else None
    return ModelSource(name, folder, pipeline, config, family, weights, variant)


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
