"""Folders that appear whole: filled beside their place by one writer at a time, and renamed when all is there.

The unfinished folder has a name that is known beforehand, so that what a killed process leaves is found by the next
one. Where the system cannot let two folders change names at once, the old one steps aside first; a kill in between is
made good by the next writer.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import Timeout

from diffc.errors import DiffcError
from diffc.locks import locked
from passes.files.atomic import check_own_folder, exchange


@contextmanager
def one_writer(output: Path, *, wait: float = 0) -> Iterator[Path]:
    """Hold the place `output`; yields the unfinished folder beside it, which need not exist.

    `wait`: seconds for which another writer is waited for. Raises DiffcError when one is writing there, OSError when
    nothing can be written, PassError when somebody has put something else under the name of the unfinished folder.
    """
    partial = output.with_name(f".{output.name}.partial")
    check_own_folder(partial)
    with ExitStack() as held:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(output.with_name(f".{output.name}.lock"), wait))
        except Timeout as error:
            raise DiffcError(
                f"another diffc is writing {output}", fix="wait for it, or choose another -o"
            ) from error
        _bring_back(output)
        yield partial


@contextmanager
def written_folder(output: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `output` when the block ends without an error.

    Raises as `one_writer` does, and the OSError of a full disk. What was at `output` is as before after any error.
    """
    with one_writer(output) as partial, filled(partial, output):
        yield partial


@contextmanager
def filled(partial: Path, output: Path) -> Iterator[None]:
    """`written_folder` while the place is held: `partial` is new and empty, and takes the place in the end."""
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir()
        yield
        take_place(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(partial: Path, output: Path) -> None:
    """Rename `partial` to `output`, while its place is held; an older folder is kept until the new one stands."""
    if exchange(partial, output):  # a reader finds the one or the other at any time
        shutil.rmtree(partial, ignore_errors=True)
        return
    old = _aside(output)
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _bring_back(output: Path) -> None:
    """Undo what a process that was killed in the middle of `take_place` has left."""
    old = _aside(output)
    check_own_folder(old)
    if old.is_dir():
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")
