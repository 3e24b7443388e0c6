"""JSON files of a model folder: config.json, model_index.json, and the index of shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.inside import inside
from diffc.records import of_pass_error, parse_record, read_record
from passes.base import PassError
from passes.files.bounded import read_text

_FIX = "download the file again"
_INFINITY = re.compile(r"(?<=:)\s*-?Infinity\b(?=\s*[,}\]])")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DiffcError when the file cannot be read or holds something else."""
    return read_record(inside(path.parent, path.name), fix=_FIX)


def read_scheduler(path: Path) -> dict[str, Any]:
    """The config of a scheduler. Raises DiffcError as `read_json` does.

    diffusers writes infinities into it (DPM-Solver's lambda_min_clipped), which JSON lacks; they are None here.
    """
    try:
        text = read_text(inside(path.parent, path.name))
    except PassError as error:
        raise of_pass_error(error, _FIX) from error
    return parse_record(_INFINITY.sub("null", text), path, fix=_FIX)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a pipeline folder, in which what has a folder is a component: [library, class], or nulls.

    Raises DiffcError as `read_json` does, and for a component of another form.
    """
    path = folder / "model_index.json"
    index = read_json(path)
    for name, entry in index.items():
        if not _is_component(entry) and not name.startswith("_") and inside(folder, name).is_dir():
            said = (
                f"{path} is damaged: the component {name} is {str(entry)[:80]!r}, not a library and a class"
            )
            raise DiffcError(said, fix=_FIX)
    return index


def _is_component(entry: object) -> bool:
    """Whether an entry of model_index.json has the form of a component."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str | None) for x in entry)


def components_in(index: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """The components of a model_index.json by name: library and class, None where a component is left out."""
    return {name: (entry[0], entry[1]) for name, entry in index.items() if _is_component(entry)}
