"""Reads an embedded model by its name: the pipeline folder that diffc makes for it on first use."""

from __future__ import annotations

from diffc.models.embedded.catalogue import EMBEDDED, materialize
from diffc.models.sources.backbone_folder import read_backbone
from diffc.models.sources.source import ModelSource, Reader


def _declines(model: str) -> str | None:
    return None if model in EMBEDDED else f"{model!r} is not the name of an embedded model"


def _open(model: str) -> ModelSource:
    folder = materialize(model)
    return read_backbone(folder / EMBEDDED[model].component, name=model, pipeline=folder)


READER = Reader("embedded model", f"the name of an embedded model: {', '.join(EMBEDDED)}", _declines, _open)
