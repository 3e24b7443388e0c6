"""Copies of what a package takes as it is: files of the pipeline's folder, and nothing that a link brings in."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffc.errors import DiffcError
from passes.files.atomic import open_new
from passes.files.contained import why_outside

_MEND = "put a copy in its place, or leave it out"


def check_tree(root: Path, name: str) -> list[Path]:
    """Every file of the folder `name` below `root`, by its path from `root`.

    Raises DiffcError for a link that leads out of `root`, to anything but a blob of the same repository in the hub's
    cache, for a link to a folder, and for what is not a file.
    """
    _check(root, Path(name))
    return list(_files(root, Path(name)))


def copy_tree(root: Path, name: str, target: Path) -> None:
    """Copy the folder `name` below `root` to `target`, links as the files that they lead to. Raises as `check_tree`."""
    for file in check_tree(root, name):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        copy_file(root / file, target / file)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to where nothing is yet. Raises DiffcError when something is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        open_new(target).close()
    except FileExistsError as error:
        raise DiffcError(f"two files of the package would be {target.name}", fix="compile again") from error
    shutil.copyfile(source, target)


def _files(root: Path, folder: Path) -> Iterator[Path]:
    with os.scandir(root / folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = folder / entry.name
            _check(root, path)
            if entry.is_dir(follow_symlinks=False):
                yield from _files(root, path)
            elif entry.is_file():
                yield path
            else:
                kind = "a broken link, or one to a folder," if entry.is_symlink() else "not a file"
                raise DiffcError(f"{root / path} is {kind}, and is not taken into a package", fix=_MEND)


def _check(root: Path, path: Path) -> None:
    if reason := why_outside(root, path.as_posix(), hub=True):
        raise DiffcError(f"{root / path} is not taken into a package: {reason}", fix=_MEND)
