"""A journal beside a file that is being written: after a kill, what is on disk and whole is not computed again.

One line of JSON each: first what the file is to hold (`identity`), then, every few megabytes, how long the file was
and the SHA-256 of all of it so far. That hash is both the proof that the disk kept what the line says and the state
from which hashing goes on. A line that was cut off, and all after it, does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.base import PassError
from passes.files.atomic import check_own, open_own

if TYPE_CHECKING:
    from _hashlib import HASH as Digest  # what hashlib.sha256() returns

EVERY = 1 << 24
"""Bytes between two lines."""
_BLOCK = 1 << 20


@dataclass
class Journal:
    """Where the journal of a file lies, what the file is to hold, and how long it was at the last line."""

    path: Path
    identity: str
    recorded: int = 0

    def begin(self, data: Path, ends: Container[int] | None = None) -> tuple[int, Digest]:
        """How many bytes at the head of `data` are what an earlier process wrote, and their hash under way.

        `ends` are the lengths at which the writer can go on, None for all. Zero when there is no journal, or one of
        something else. The journal then starts anew.
        """
        lines = [line for line in self._lines() if ends is None or line[0] in ends]
        length, digest = _verified(data, lines)
        kept = [line for line in lines if line[0] <= length]
        self.recorded = length
        text = "".join(json.dumps(entry) + "\n" for entry in (self.identity, *kept))
        with open_own(self.path, new=True) as file:
            file.write(text.encode())
        return length, digest

    def matches(self) -> bool:
        """Whether there is a journal, and it is of this identity."""
        return self._entries()[:1] == [self.identity]

    def record(self, length: int, digest: Digest, *, force: bool = False) -> None:
        """Note that the file holds `length` bytes with this hash, unless the last line is too recent."""
        if length - self.recorded < (1 if force else EVERY):
            return
        with open_own(self.path) as file:
            file.seek(0, os.SEEK_END)
            file.write((json.dumps([length, digest.hexdigest()]) + "\n").encode())
        self.recorded = length

    def _entries(self) -> list[Any]:
        entries: list[Any] = []
        if not check_own(self.path):
            return entries
        try:
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entries.append(json.loads(line))
        except (OSError, ValueError, RecursionError):
            pass  # no journal, or its last line was cut off
        return entries

    def _lines(self) -> list[tuple[int, str]]:
        identity, *entries = self._entries() or [""]
        if identity != self.identity:
            return []
        pairs = (e for e in entries if isinstance(e, list) and len(e) == 2)
        return [(length, digest) for length, digest in pairs if type(length) is int and type(digest) is str]


def _verified(data: Path, lines: list[tuple[int, str]]) -> tuple[int, Digest]:
    """The length at the last line up to which the file has the hashes of all lines, and its hash under way."""
    digest = hashlib.sha256()
    good = 0, digest.copy()
    if not lines or not data.is_file():
        return good
    with data.open("rb") as file:
        for length, expected in lines:
            while (missing := length - file.tell()) > 0 and (block := file.read(min(_BLOCK, missing))):
                digest.update(block)
            if file.tell() != length or digest.hexdigest() != expected:
                break
            good = length, digest.copy()
    return good


def fingerprint(path: str) -> list[Any]:
    """A source file as a journal knows it: path, size in bytes, time of the last change in nanoseconds."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise PassError(f"{path} is missing: weights cannot be read. Fix: run the command again") from error
    return [path, stat.st_size, stat.st_mtime_ns]


@lru_cache(maxsize=1)
def code_version() -> str:
    """A hash of all code of `passes` and the versions of the libraries that its results depend on."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for library in ("numpy", "ml_dtypes", "onnx"):
        digest.update(f"{library} {metadata.version(library)}".encode())
    return digest.hexdigest()
