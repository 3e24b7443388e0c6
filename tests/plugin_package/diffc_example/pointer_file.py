"""Reads a text file NAME.pointer whose one line is the path of a backbone folder."""

from __future__ import annotations

from pathlib import Path

from diffc.models.sources.backbone_folder import read_backbone
from diffc.models.sources.source import ModelSource, Reader


def _declines(model: str) -> str | None:
    return None if model.endswith(".pointer") and Path(model).is_file() else "it is not a .pointer file"


def _open(model: str) -> ModelSource:
    file = Path(model)
    return read_backbone(Path(file.read_text(encoding="utf-8").strip()), name=file.stem, pipeline=None)


READER = Reader("pointer file", "a NAME.pointer file with the path of a backbone folder", _declines, _open)
