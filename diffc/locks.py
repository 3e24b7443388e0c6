"""One writer to a place: a lock file beside it that is gone when nobody writes, and that dies with its process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_TRIES = 100


@contextlib.contextmanager
def locked(path: Path, wait: float = 0) -> Iterator[None]:
    """Hold the lock file `path`, and remove it at the end.

    Raises filelock.Timeout when another process holds it for longer than `wait` seconds, OSError when it cannot be
    made.
    """
    lock = _acquired(path, wait)
    try:
        yield
    finally:
        # Removed while it is held: who opens the name from here on makes a new file. Windows removes no open file.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()
        if os.name == "nt":
            with contextlib.suppress(OSError):
                path.unlink()


def _acquired(path: Path, wait: float) -> FileLock:
    """The lock, held on the file that has the name `path` now.

    Between opening a lock file and locking it, its holder may have removed it. Then the lock is on a file without a
    name, and a third process would take a new one of the same name at the same time.
    """
    for _ in range(_TRIES):
        lock = FileLock(path)
        lock.acquire(timeout=wait)
        if _is_named(lock, path):
            return lock
        lock.release()
    raise Timeout(str(path))


def _is_named(lock: FileLock, path: Path) -> bool:
    descriptor = lock._context.lock_file_fd
    if descriptor is None or os.name == "nt":  # Windows keeps the name of an open file
        return True
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
