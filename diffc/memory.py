"""How much memory a process has held."""

from __future__ import annotations

from pathlib import Path

from diffc.errors import UsageError


def check_room(needed: int, what: str, *, fix: str) -> None:
    """Raise UsageError when `what` takes more bytes than this machine has free: asked before they are allocated."""
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"{what} takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free", fix=fix
        )


def peak_rss() -> int | None:
    """The most memory in bytes that this process has held, where the system says (Linux, Windows)."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: its figure survives exec, so it would be that of the parent
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), "")
        return int(line.split()[1]) * 1024 if line else None
    import psutil

    return getattr(psutil.Process().memory_info(), "peak_wset", None)
