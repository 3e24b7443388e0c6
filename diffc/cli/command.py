"""What all commands share: the options -q, -v, --log-file, --json and --debug, and a help in groups with examples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from diffc.cli.choices import filled

SHARED = {
    "quiet": (
        Annotated[bool, typer.Option("--quiet", "-q", help="Print the result, and no progress.")],
        False,
    ),
    "verbose": (
        Annotated[bool, typer.Option("--verbose", "-v", help="Print what diffc and the libraries log.")],
        False,
    ),
    "log_file": (
        Annotated[
            Path | None,
            typer.Option("--log-file", metavar="FILE", help="Write all log records to this file."),
        ],
        None,
    ),
    "json_file": (
        Annotated[
            str | None,
            typer.Option(
                "--json", metavar="FILE", help="Write the result as JSON to this file; - prints it."
            ),
        ],
        None,
    ),
    "debug": (Annotated[bool, typer.Option("--debug", help="Show tracebacks.")], False),
}
"""Parameter name -> annotation and default."""
SHARED_PANEL = "Every command"
_LONGEST = 200
"""Characters of a command's help in the list of commands."""


class Command(TyperCommand):
    """A command whose help shows its options in groups (`rich_help_panel`), those of every command last."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The names of the arguments, as click writes them: MODEL, [NAME]."""
        arguments = (param for param in self.get_params(ctx) if param.param_type_name == "argument")
        return ["[OPTIONS]", *(_argument(a) if a.required else f"[{_argument(a)}]" for a in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group, in the order of the options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            is_argument = param.param_type_name == "argument"
            title = "Arguments" if is_argument else "Options"
            if param.name in SHARED or param.name == "help":
                title = SHARED_PANEL
            title = getattr(param, "rich_help_panel", None) or title
            name, text = (_argument(param), record[1]) if is_argument else record
            sections.setdefault(title, []).append((name, filled(text)))
        shared = sections.pop(SHARED_PANEL, [])
        for title, rows in {**sections, SHARED_PANEL: shared}.items():
            with formatter.section(title):
                formatter.write_dl(rows)


class Group(TyperGroup):
    """A group whose help lists its commands by what they are for (`rich_help_panel`)."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each kind of command."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                title = getattr(command, "rich_help_panel", None)
                title = title if isinstance(title, str) else "Commands"
                sections.setdefault(title, []).append((name, command.get_short_help_str(_LONGEST)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def _argument(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def examples(*lines: str) -> str:
    """The end of a help text: commands, one a line, as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """`function(terminal, ...)` as a command: it takes the options of every command too, and is given a Terminal."""
    first, *parameters = inspect.signature(function).parameters.values()
    # The Terminal's type is imported when a command runs.
    hints = get_type_hints(function, localns={first.annotation: object}, include_extras=True)
    own = [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in SHARED.items()
    ]

    @functools.wraps(function)
    def command(**values: Any) -> None:
        from diffc.cli.terminal import Verbosity, opened

        quiet, verbose, log_file, json_file, _ = (values.pop(name) for name in SHARED)
        with opened(Verbosity(quiet, verbose, log_file, json_file)) as terminal:
            function(terminal, **values)

    command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    return command
