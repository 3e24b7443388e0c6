"""Files of a model folder: names that a file of the folder gives never lead out of it."""

from __future__ import annotations

from pathlib import Path

from diffc.errors import DiffcError
from passes.files.contained import why_outside


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`.

    A link of huggingface_hub's cache to a blob of the same repository is followed. Raises DiffcError for every other
    name or link that leads out of the folder.
    """
    if reason := why_outside(folder, name, hub=True):
        raise DiffcError(
            f"{folder}: the path {name!r} leaves the folder: {reason}",
            fix="put the file there in the place of a link, and get models from a source that you trust",
        )
    return folder / name
