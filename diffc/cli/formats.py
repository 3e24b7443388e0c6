"""`diffc formats`: the quantization formats and the GPUs that have them."""

from __future__ import annotations


def formats_command() -> None:
    """List the quantization formats and the compute capabilities that have them."""
    from diffc.cli.tables import list_formats
    from diffc.cli.terminal import Terminal

    list_formats(Terminal().console)
