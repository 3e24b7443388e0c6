"""`diffc doctor`: what works on this machine."""

from __future__ import annotations


def doctor_command() -> None:
    """Say what works on this machine, why the rest does not, and what fixes it."""
    from diffc.cli.tables import examined
    from diffc.cli.terminal import Terminal
    from diffc.commands.doctor import examine

    examined(examine(), Terminal().console)
