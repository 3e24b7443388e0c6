"""Files that a command is told to write: what is there already is replaced only when it is a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from passes.files.atomic import irregular, written


def check_output_file(path: Path) -> None:
    """Raise DiffcError when the folder of `path` is not there, or something other than a regular file is at `path`.

    To be called before any work: no command makes the folder of a file that it is told to write.
    """
    try:
        kind = irregular(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, links in a circle
        raise DiffcError(f"cannot write to {path}: {error}", fix="name another output") from error
    if kind:
        raise DiffcError(f"{path} is {kind}, not a file: it is left as it is", fix="name another output")
    check_parent(path)


def check_parent(path: Path) -> None:
    """Raise DiffcError when the folder that `path`, a file or a folder, is to lie in does not exist."""
    if not path.absolute().parent.is_dir():
        raise DiffcError(f"the folder of {path} does not exist", fix="make it, or name another place")


def save_figure(figure: Any, path: Path) -> None:
    """Draw a figure of matplotlib into `path`, of the kind that its ending says, whole or not at all."""
    with written(path) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:].lower())
