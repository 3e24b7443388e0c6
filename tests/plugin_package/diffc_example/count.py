"""`diffc count`: how many nodes of each operator an ONNX file has."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal


def count_command(terminal: Terminal, model: Annotated[Path, typer.Argument(help="An .onnx file.")]) -> None:
    """Count the nodes of an ONNX file by operator."""
    from passes.storage import load

    counted = Counter(node.op_type for node in load(model).graph.node)
    for op, number in sorted(counted.items()):
        terminal.console.print(f"{op} {number}")
