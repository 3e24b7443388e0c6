"""The page: templates of jinja2, in which every name of a file is text and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from diffc.terminal_text import shown
from diffc.version import VERSION

_LONGEST = 20_000
"""Characters of one text of a file that a page shows."""


def page(**content: Any) -> str:
    """The whole page. `sections`: what is there, in order; the other values are those that their templates read."""
    style = files("diffc.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    return _environment().get_template("page.html").render(style=Markup(style), version=VERSION, **content)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("diffc.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )


def _harmless(value: Any) -> Any:
    """Texts without control characters, and without those that turn the text after them around."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return shown(value, _LONGEST)
    return value


def section(name: str, title: str, text: str = "") -> Mapping[str, str]:
    """An entry of `sections`: its template, its heading, and a line below that."""
    return {"id": name, "name": title, "text": text}
