"""`diffc passes`: the passes, their options and what they do."""

from __future__ import annotations


def passes_command() -> None:
    """List the passes, their options and what they do."""
    from diffc.cli.tables import list_passes
    from diffc.cli.terminal import Terminal

    list_passes(Terminal().console)
