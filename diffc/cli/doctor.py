"""`diffc doctor`: what works on this machine."""

from __future__ import annotations


def doctor_command() -> None:
    """Say what works on this machine, why the rest does not, and what fixes it."""
    from diffc.cli.tables import examined
    from diffc.commands.doctor import examine
    from diffc.progress import Terminal

    examined(examine(), Terminal().console)
