"""What this machine gives a sweep: workers, memory and threads."""

from __future__ import annotations

import os

import psutil

from diffc.sweep.request import SweepRequest

_SHARE = 0.9
"""Of the memory that is free, what compiles may hold together where nobody says otherwise."""


def workers_of(request: SweepRequest) -> int:
    """Compiles at a time: those asked for, or one for each core."""
    return request.workers or psutil.cpu_count(logical=False) or os.cpu_count() or 1


def memory_of(request: SweepRequest) -> int:
    """Bytes that compiles may hold together."""
    return request.memory or int(_SHARE * psutil.virtual_memory().available)


def threads_of(request: SweepRequest) -> int:
    """Threads of each compile: those of OMP_NUM_THREADS, or its share of the cores."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and int(said) > 0:
        return int(said)
    return max(1, (os.cpu_count() or 1) // workers_of(request))
