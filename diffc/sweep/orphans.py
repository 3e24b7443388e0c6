"""A process that ends itself when the one that has started it is gone, on every system."""

from __future__ import annotations

import contextlib
import os
import sys

import psutil

ORPHANED = 70
"""The exit code of a process whose worker is gone."""


def watch() -> None:
    """Wait for the end of standard input, which whoever has started this process keeps open; then end all.

    What this process has started, such as a builder, ends with it.
    """
    while sys.stdin.buffer.read(1):
        pass
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(ORPHANED)
