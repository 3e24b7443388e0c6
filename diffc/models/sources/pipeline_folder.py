"""Reads a diffusers pipeline folder: model_index.json, and the backbone in the folder of its component."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import backbone_among, components
from diffc.models.sources.backbone_folder import folder_of, read_backbone
from diffc.models.sources.components import pipeline_variant
from diffc.models.sources.hub_cache import identity
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import components_in, read_index
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource, Reader


def _declines(options: HubOptions, model: str) -> str | None:
    folder = folder_of(model, options.subfolder)
    if not folder.is_dir():
        return f"{folder} is not a folder"
    return None if (folder / "model_index.json").is_file() else f"{folder} has no model_index.json"


def _open(options: HubOptions, model: str) -> ModelSource:
    folder = folder_of(model, options.subfolder)
    backbone, (name, revision) = component(folder), identity(folder)
    variant = pipeline_variant(folder, options.variant)
    source = read_backbone(backbone, name=name, pipeline=folder, variant=variant)
    return replace(source, revision=revision)


def component(pipeline: Path) -> Path:
    """The backbone folder of a pipeline folder. Raises DiffcError when it is missing, or no component is a backbone."""
    index = read_index(pipeline)
    named = backbone_among({name: kind for name, (_, kind) in components_in(index).items() if kind})
    if named is None:
        kind = index.get("_class_name", "pipeline")
        raise UnsupportedError(
            f"{pipeline}: this {kind} has none of the components {', '.join(components())}",
            fix="give a pipeline with a denoising backbone",
        )
    folder = inside(pipeline, named)
    if not (folder / "config.json").is_file():
        raise DiffcError(
            f"model_index.json names the component {named!r}, but {folder / 'config.json'} does not exist",
            fix="download the pipeline completely",
        )
    return folder


def reader(options: HubOptions) -> Reader:
    """The reader of pipeline folders; `options` give a subfolder and a variant."""
    expects = "a diffusers pipeline folder (model_index.json)"
    return Reader("pipeline folder", expects, partial(_declines, options), partial(_open, options))


READER = reader(DEFAULT_HUB)
