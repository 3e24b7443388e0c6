"""The one place where text goes to the terminal: what comes from a file says nothing to the terminal itself.

Names in a model, a manifest or a message of a library can hold escape sequences, line ends that look like a line of
diffc's own, and rich's markup. They are shown as they are written: `\\x1b`, `\\n`, `[/red]`.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

LIMIT = 4000
"""Characters of one message; the middle of a longer one is left out."""
UNFOLDED = 240
"""Columns of a table that goes to a file: more than any of ours has, few enough to be read."""
_BAR = "\n  | "
_UNSHOWN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f"  # control characters, all but the line end
    "\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # invisible ones, and what turns text around
    "\ud800-\udfff\U000e0000-\U000e0fff]"  # lone surrogates, tags
)


def shown(value: object, limit: int = LIMIT) -> str:
    """`value` as text of one line or several that is harmless on a terminal, no longer than about `limit`."""
    text = _UNSHOWN.sub(_escaped, str(value).replace("\r\n", "\n").replace("\t", "    "))
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


def line(value: object, limit: int = LIMIT) -> str:
    """`value` as `shown`, in one line: its line ends are shown as `\\n`."""
    return shown(value, limit).replace("\n", "\\n")


def block(value: object, limit: int = LIMIT) -> str:
    """`value` as `shown`; lines after the first begin with a bar, so that none passes for one of diffc's own."""
    return _BAR.join(part.removeprefix("  | ") for part in shown(value, limit).splitlines())


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


def styled(*parts: object | tuple[object, str]) -> Text:
    """A line of rich text: each part as it is, or (part, style). No part is read as markup."""
    text = Text()
    for part in parts:
        value, style = part if isinstance(part, tuple) else (part, "")
        text.append(line(value), style or None)
    return text


def cell(value: object, style: str = "") -> Text:
    """A cell of a table: its line ends stay, since the table's frame holds it."""
    return Text(shown(value), style)


class Screen(Console):
    """rich's console; a text that it is given is shown as it is, and says nothing to the terminal.

    A file, a pipe or the log of a CI has no width: what goes there is as wide as it needs, and not folded at the 80
    columns that rich takes for it. `COLUMNS` in the environment says otherwise.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **settings})
        if not (self.is_terminal or "width" in settings or os.environ.get("COLUMNS", "").isdigit()):
            self.width = UNFOLDED

    def render_str(self, text: str, **settings: Any) -> Text:
        """The text of everything that is printed or is in a table as a `str`: never markup. Raises nothing."""
        return super().render_str(shown(text), **{**settings, "markup": False, "emoji": False})


def error_text(error: BaseException) -> str:
    """What the command line says of an error that the user can fix: its text, and below it what to do."""
    what, fix = getattr(error, "what", None), getattr(error, "fix", "")
    if not isinstance(what, str):
        return f"error: {block(error)}"
    label = str(error)[len(what) :].removesuffix(fix) if fix else ""
    return f"error: {block(what)}{label}{block(fix)}"


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`: the traceback of our bug, in which texts of files are harmless too."""
    print(shown("".join(traceback.format_exception(kind, error, trace)), 50_000), file=sys.stderr)
