"""Files that appear under their final name when they are whole: written beside it, then renamed.

Where a killed process is to find its own again, the name beside it is known beforehand. So in a folder that others may
write to, somebody can have put a link there: nothing is ever opened through one, and what is taken up must be ours.
"""

from __future__ import annotations

import ctypes
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

from passes.base import PassError

_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def irregular(path: Path) -> str:
    """What `path` is where it is there and is not a regular file, such as "a device"; else empty. Links are followed.

    Raises OSError when the system does not tell.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "not a regular file")


def open_new(path: Path) -> io.FileIO:
    """A new file for writing, unbuffered. Raises FileExistsError when something is there, be it a link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666), "w+b", buffering=0)


def open_own(path: Path, *, new: bool = False) -> io.FileIO:
    """The regular file `path` of this user for reading and writing, unbuffered; made when it is not there.

    With `new`, one that is there goes first. Raises PassError for a link and for what is not this user's regular file
    of one name: nothing of it is read or changed.
    """
    if check_own(path):
        if not new:
            return _opened(path)
        path.unlink()
    try:
        return open_new(path)
    except FileExistsError as error:  # put there in between
        raise _not_ours(path, "somebody else has just made it") from error


def check_own(path: Path) -> bool:
    """Whether `path` is there. Raises PassError when it is not a regular file of this user, of one name."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    _check(path, found)
    return True


def _opened(path: Path) -> io.FileIO:
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | _FLAGS), "r+b", buffering=0)
    except OSError as error:
        if path.is_symlink():
            raise _not_ours(path, "it is a link") from error
        raise
    try:  # once more, on what was opened: the first look was at a name
        found = os.fstat(file.fileno())
        _check(path, found)
        if not os.path.samestat(found, path.lstat()):
            raise _not_ours(path, "it is a link")
    except BaseException:
        file.close()
        raise
    return file


def _check(path: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise _not_ours(path, "it is a link")
    if not stat.S_ISREG(found.st_mode):
        raise _not_ours(path, f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'not a regular file')}")
    if found.st_nlink > 1:
        raise _not_ours(path, "it has a second name")
    _check_owner(path, found)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise _not_ours(path, "it belongs to another user")


def check_own_folder(path: Path) -> None:
    """Raise PassError when `path` is there and is a link, not a folder, or another user's."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(found.st_mode):
        raise _not_ours(path, "it is a link" if stat.S_ISLNK(found.st_mode) else "it is not a folder")
    _check_owner(path, found)


def _not_ours(path: Path, reason: str) -> PassError:
    return PassError(
        f"cannot write to {path} on the way: {reason}. Fix: remove it, or write to another folder"
    )


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; it takes the name `path` when the block ends without an error, and is on the disk by then.

    Until then it has a name beside it. Raises PassError when what is at `path` is not a regular file.
    """
    partial, raw = _begun(path)
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _CLOSED_FIRST:  # while it is held: nobody takes it for a leftover
                replace(partial, path)
        if _CLOSED_FIRST:
            replace(partial, path)
    finally:
        drop(partial)


_CLOSED_FIRST = os.name == "nt"
"""Whether a file must be closed to be renamed."""


def _begun(path: Path) -> tuple[Path, io.FileIO]:
    """A new file beside `path` and its name: one that the next writer of `path` knows, should this process be killed.

    While another process is writing `path`, where that name is somebody else's, and on Windows, which lets nobody
    rename a file that is held, it has a name that nobody can know.
    """
    known = path.with_name(f".{path.name[:40]}.partial")
    try:
        _clear(known)
        if not _CLOSED_FIRST:
            file = open_new(known)
            if _hold(file) is not False and _is_named(file, known):
                return known, file
            file.close()  # another process takes it for a leftover, and removes it
    except (PassError, FileExistsError):
        pass
    unknown = path.with_name(f".{path.name[:40]}-{uuid4().hex[:12]}.partial")
    return unknown, open_new(unknown)


def _clear(known: Path) -> None:
    """Remove what a process that was killed has left under that name; what another is writing stays."""
    if not _CLOSED_FIRST and check_own(known):
        with open_own(known) as file:
            if _hold(file) and _is_named(file, known):
                known.unlink()


def _hold(file: io.FileIO) -> bool | None:
    """Lock an open file until it is closed, or its process ends; False when another has it, None where none can."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_named(file: io.FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except OSError:
        return False


def replace(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`. Raises PassError when what is there is not a regular file: it stays as it is."""
    if kind := irregular(path):
        raise PassError(f"{path} is {kind}, not a file: it is left as it is. Fix: name another output")
    partial.replace(path)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names at once, so that neither name is without one; False where the system cannot.

    Linux: renameat2 with RENAME_EXCHANGE, which most file systems have (man 2 rename).
    """
    if sys.platform != "linux" or not (one.is_dir() and other.is_dir()):
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    failed: int = call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return failed == 0


_HERE, _EXCHANGE = -100, 2


def drop(partial: Path) -> None:
    """Remove what this process wrote beside a final name; what is not ours stays."""
    try:
        if check_own(partial):
            partial.unlink()
    except PassError:
        pass


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises as `written` does."""
    with written(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all, line ends as they are. Raises as `written` does."""
    write_bytes(path, text.encode("utf-8"))
