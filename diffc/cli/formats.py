"""`diffc formats`: the quantization formats and the GPUs that have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples("diffc formats", "diffc formats --json -")


def formats_command(terminal: Terminal) -> None:
    """List the quantization formats and the GPUs that have them."""
    from diffc.cli.listings import list_formats

    list_formats(terminal)
