"""Puts a pipeline around a backbone that was given alone; reads folders, and imports no torch."""

from __future__ import annotations

from dataclasses import replace

from diffc.errors import UsageError
from diffc.models.sources.locate import locate
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource


def with_pipeline(source: ModelSource, place: str, options: HubOptions = DEFAULT_HUB) -> ModelSource:
    """A backbone with the pipeline at `place` around it: a folder, or an id of the hub.

    Raises UsageError when there is no pipeline, or one of another family.
    """
    found = locate(place, options)
    if found.pipeline_dir is None:
        raise UsageError(
            f"{place} is a backbone alone, and --pipeline takes a pipeline", fix="give its folder"
        )
    if found.family.name != source.family.name:
        raise UsageError(
            f"{place} is a pipeline of {found.family}, and {source.path} is {source.family}",
            fix="give a pipeline of the same family with --pipeline",
        )
    return replace(source, pipeline_dir=found.pipeline_dir, variant=found.variant)
