"""What Windows has not is imported nowhere without a way around it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = [file for name in ("diffc", "passes", "tools") for file in sorted((ROOT / name).rglob("*.py"))]
ABSENT = {
    "resource",
    "fcntl",
    "pwd",
    "grp",
    "termios",
    "pty",
    "tty",
    "syslog",
    "posix",
    "crypt",
    "nis",
    "spwd",
}
CALLS = {
    *("fork", "forkpty", "getuid", "geteuid", "killpg", "setsid", "mkfifo", "nice", "getloadavg", "statvfs"),
    *("sched_setaffinity", "sched_getaffinity", "fdatasync", "sync", "pread", "pwrite", "sendfile"),
    *("posix_fadvise", "posix_fallocate"),
}


def wanted(source: str) -> Iterator[str]:
    """Modules imported and attributes of `os` used that Windows' Python has not, unless it asks for them."""
    if "hasattr(os, " in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names if item.name.split(".")[0] in ABSENT)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module.split(".")[0] in ABSENT:
                yield node.module
            elif node.module == "os":
                yield from (item.name for item in node.names if item.name in CALLS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            yield from ([node.attr] if node.attr in CALLS else [])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_nothing_that_windows_lacks(file: Path) -> None:
    assert not list(wanted(file.read_text(encoding="utf-8")))


def test_the_search_finds() -> None:
    source = "import resource\nfrom fcntl import flock\nimport os\nfrom os import fork\nos.fdatasync(1)\nos.fsync(1)"
    assert sorted(wanted(source)) == ["fcntl", "fdatasync", "fork", "resource"]
    assert not list(wanted('import os\nif hasattr(os, "sync"):\n    os.sync()'))
