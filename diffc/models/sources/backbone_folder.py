"""Reads a backbone folder as diffusers writes it: config.json beside safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffc.models.capture.capture import capture
from diffc.models.captured import captured_family
from diffc.models.config_check import check_config, check_numbers
from diffc.models.embedded.catalogue import native_of
from diffc.models.family import Family
from diffc.models.registry import family_of, known_family
from diffc.models.sources.components import check_variant
from diffc.models.sources.hub_cache import identity
from diffc.models.sources.json_files import read_json
from diffc.models.sources.safetensors_files import file_names, folder_weights
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource, Reader
from diffc.models.sources.weight_names import choose
from diffc.models.spec import Config
from diffc.models.stored.folder import ENTRY, decode_folder, is_quantized
from diffc.models.stored.held import compute_dtype


def read_backbone(
    folder: Path, *, name: str, pipeline: Path | None, variant: str | None = None
) -> ModelSource:
    """The backbone in `folder`; its family is found before its weights are looked at, since that costs nothing.

    `variant` is that of the pipeline; None for a backbone alone takes plain files before any variant.
    Raises UnsupportedError for a backbone of no known family, DiffcError for a folder that is not complete.
    """
    config: Mapping[str, Any] = read_json(folder / "config.json")
    config, said = {key: value for key, value in config.items() if key != ENTRY}, config
    check_numbers(config, folder / "config.json")
    family = _family(config, folder, pipeline)
    config = family.completed(config, _index(folder, pipeline))
    check_config(family, config, folder / "config.json")
    weights = folder_weights(folder, variant)
    check_numbers(config, folder / "config.json", weights)
    if pipeline is None:
        chosen = choose(file_names(folder), variant)
        variant = chosen.variant if chosen else None
    source = ModelSource(name, folder, pipeline, config, family, weights, variant)
    return as_decoded(source, said) if is_quantized(said, weights) else source


def as_decoded(source: ModelSource, config: Config) -> ModelSource:
    """The source of a folder whose weights ModelOpt quantized, scales taken in; `config` is its whole config.json."""
    found = decode_folder(source.path, config, source.weights)
    dtype = compute_dtype(found.weights, found.held)
    return replace(source, weights=found.weights, held=found.held, stored_dtype=dtype)


def _index(folder: Path, pipeline: Path | None) -> dict[str, Any] | None:
    """model_index.json of the pipeline, also where the folder of its backbone was given; None where there is none."""
    place = pipeline or folder.parent
    if not (place / "model_index.json").is_file():
        return None
    index = read_json(place / "model_index.json")
    return index if pipeline is not None or folder.name in index else None


def _family(config: Config, folder: Path, pipeline: Path | None) -> Family:
    """The family that a file describes, or one read off calls of the pipeline that the backbone belongs to."""
    known = known_family(config)
    pipeline = pipeline or _pipeline_around(folder)
    if known is not None or pipeline is None:
        return known or family_of(config, folder / "config.json")
    interface = capture(pipeline, folder.name)
    return captured_family(replace(interface, native={**interface.native, **native_of(pipeline)}), config)


def _pipeline_around(folder: Path) -> Path | None:
    """The pipeline folder in which a backbone folder lies as one of its components."""
    index = folder.parent / "model_index.json"
    return folder.parent if index.is_file() and folder.name in read_json(index) else None


def folder_of(model: str, subfolder: str = "") -> Path:
    """MODEL as a path: the user's home folder filled in, absolute, with `subfolder` in it."""
    return Path(model).expanduser().absolute() / subfolder


def _declines(options: HubOptions, model: str) -> str | None:
    folder = folder_of(model, options.subfolder)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return None if (folder / "config.json").is_file() else f"{folder} has no config.json"


def _open(options: HubOptions, model: str) -> ModelSource:
    folder = folder_of(model, options.subfolder)
    if options.variant:
        check_variant(folder, file_names(folder), options.variant)
    name, revision = identity(folder)
    source = read_backbone(folder, name=name, pipeline=None, variant=options.variant)
    return replace(source, revision=revision)


def reader(options: HubOptions) -> Reader:
    """The reader of backbone folders; `options` give a subfolder and a variant."""
    expects = "a backbone folder (config.json, safetensors)"
    return Reader("backbone folder", expects, partial(_declines, options), partial(_open, options))


READER = reader(DEFAULT_HUB)
