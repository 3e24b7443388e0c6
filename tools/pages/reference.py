"""Pages of the site that are made of the code: they cannot say anything else than the code does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

WIDTH = 100
"""Columns of the commands' help."""


def commands_page() -> str:
    """Every command with its help, in the order of `diffc --help`."""
    from typer.main import get_command

    from diffc.cli.main import app

    root: Any = get_command(app)
    parts = ["# Commands", "What `diffc COMMAND --help` prints.", _block(help_of(root, "diffc"))]
    for name, command in walk(root, "diffc"):
        parts += [f"## {name}", _block(help_of(command, name))]
    return "\n\n".join(parts) + "\n"


def walk(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of a group with their whole names; those of groups in it after them."""
    for child, command in group.commands.items():
        whole = f"{name} {child}"
        yield from walk(command, whole) if hasattr(command, "commands") else [(whole, command)]


def help_of(command: Any, name: str) -> str:
    """The help of a command as it is printed."""
    text: str = command.get_help(command.context_class(command, info_name=name, terminal_width=WIDTH))
    return inspect.cleandoc(text)


def passes_page() -> str:
    """Every pass with its options and docstring, in the order of the alphabet."""
    from passes import all_passes

    parts = ["# Passes", "What `diffc passes` prints. `diffc opt` runs them, and `diffc compile --passes`."]
    for name, cls in sorted(all_passes().items()):
        options = ", ".join(f"`{option}`" for option in _options(cls))
        parts += [f"## {name}", f"Options: {options}." if options else "", _block(inspect.getdoc(cls) or "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options(cls: Any) -> Iterator[str]:
    """The fields of a pass as its syntax writes them."""
    for field in fields(cls):
        yield field.name if field.default is MISSING else f"{field.name}={field.default}"


def _block(text: str) -> str:
    return f"```text\n{text.replace('```', '')}\n```"
