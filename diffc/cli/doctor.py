"""`diffc doctor`: what works on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffc.cli.command import examples

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples("diffc doctor", "diffc doctor --json -")


def doctor_command(terminal: Terminal) -> None:
    """Say what works on this machine, why the rest does not, and what fixes it. Exit code 1: diffc cannot compile."""
    from diffc.cli.listings import examined
    from diffc.commands.doctor import examine, require_able

    findings = examine(terminal.ui)
    examined(findings, terminal)
    require_able(findings)
