"""Finds everything in a package but its backbone: in a pipeline folder, or in an export of optimum-cli."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffc.artifact.folder import Artifact
from diffc.artifact.model import compiled_model
from diffc.errors import DiffcError
from diffc.models.sources.components import pipeline_variant
from diffc.models.sources.hub_cache import is_repository
from diffc.models.sources.json_files import components_in, read_index
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import AnyPath, as_path, as_text
from passes.files.contained import contained

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_AS_THEY_ARE = ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler", "feature_extractor")


@dataclass(frozen=True)
class Parts:
    """What to take from `folder`, whose model_index.json is `index`.

    `graphs`: components to export, name -> class. `exported`: folders that hold a model.onnx already. `taken`: folders
    to copy, which have no graph. `variant`: the word in the names of weight files, None for plain names.
    """

    folder: Path
    index: Mapping[str, Any]
    taken: tuple[str, ...]
    graphs: Mapping[str, str] = field(default_factory=dict)
    exported: tuple[str, ...] = ()
    variant: str | None = None


def find_parts(
    artifact: Artifact, components: Path | None, pipeline: AnyPath | None, hub: HubOptions = DEFAULT_HUB
) -> Parts:
    """The parts of an artifact's pipeline. Raises DiffcError that says which folder or file is missing.

    `pipeline` is a folder, or a model of the hub; None for the one of the compile. `hub` says which files are read.
    """
    if components is not None:
        return _exported(components)
    folder, variant = _pipeline(artifact, pipeline, hub)
    index = _index(folder, "a diffusers pipeline folder")
    named = {name: kind for name, (_, kind) in components_in(index).items() if kind}
    graphs = {name: kind for name, kind in named.items() if name in (*TEXT_ENCODERS, "vae")}
    _all_there(folder, [name for name in (*graphs, *_AS_THEY_ARE) if name in named])
    taken = tuple(name for name in _AS_THEY_ARE if name in named)
    return Parts(folder, index, taken, graphs, variant=variant or pipeline_variant(folder))


def _pipeline(artifact: Artifact, given: AnyPath | None, hub: HubOptions) -> tuple[Path, str | None]:
    """The pipeline folder that is given or was compiled, and its variant.

    A folder that is given needs no backbone. Raises DiffcError for a backbone alone, or none.
    """
    if (
        given is not None
        and (folder := as_path(given) / hub.subfolder).is_dir()
        and not is_repository(folder)
    ):
        return folder, hub.variant
    option = "--pipeline DIR, or give an optimum-cli export: --components DIR"
    source = compiled_model(artifact, None if given is None else as_text(given), option, hub)
    if source.pipeline_dir is None:
        raise DiffcError(f"{source.path} is a backbone without its pipeline", fix=f"name it: {option}")
    return source.pipeline_dir, source.variant


def _exported(folder: Path) -> Parts:
    """Everything but the backbone of a folder that `optimum-cli export onnx` wrote."""
    index = _index(folder, "a folder of optimum-cli export onnx")
    named = {name for name, (_, kind) in components_in(index).items() if kind}
    graphs = [name for name in TEXT_ENCODERS if name in named] + ["vae_decoder"]
    graphs += ["vae_encoder"] if (folder / "vae_encoder").is_dir() else []
    for name in graphs:
        for file in ("model.onnx", "config.json"):
            if not (folder / name / file).is_file():
                raise DiffcError(
                    f"{folder} has no {name}/{file}",
                    fix="give a folder that `optimum-cli export onnx` wrote, or leave --components out",
                )
    taken = tuple(name for name in _AS_THEY_ARE if name in named)
    _all_there(folder, list(taken))
    return Parts(folder, index, taken, exported=tuple(graphs))


def _index(folder: Path, what: str) -> dict[str, Any]:
    path = contained(folder, "model_index.json", hub=True)
    if not path.is_file():
        raise DiffcError(f"{folder} has no {path.name}", fix=f"give {what}")
    return read_index(folder)


def _all_there(folder: Path, names: list[str]) -> None:
    for name in names:
        if not (folder / name).is_dir():
            raise DiffcError(
                f"{folder / 'model_index.json'} names {name}, and there is no such folder",
                fix="download the pipeline completely",
            )
