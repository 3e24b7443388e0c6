"""The commands of the documents, as the tests that run and check them read them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
_FENCED = re.compile(r"^(?:<!-- test: ([\w ]+) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^ {4,}((?:diffc|python3?|py|pip|polygraphy|sh|cd|\.venv\S*)(?: .*)?)$", re.MULTILINE)
_DIFFC = ("diffc", ".venv/Scripts/diffc")


@dataclass(frozen=True)
class Line:
    """One line of a document that a reader would type: the page, the text, and its words as a shell splits them."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text.replace("\\", "/"), comments=True)

    @property
    def arguments(self) -> list[str] | None:
        """What follows `diffc`; None of another program's command."""
        return self.words[1:] if self.words[0] in _DIFFC else None

    @property
    def command(self) -> str:
        """The name of diffc's command, with that of the command in it."""
        given = self.arguments or [""]
        return " ".join(given[:2]) if given[0] in ("cache", "models", "checkpoint") else given[0]

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """The fenced blocks of a page: what the comment before it tells tests, its language and its text."""
    for found in _FENCED.finditer(page.read_text(encoding="utf-8")):
        yield found[1] or "", found[2], found[3]


def lines(page: Path) -> list[Line]:
    """The commands of a page: those of blocks without a language, and indented ones."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for _, kind, block in blocks(page) if not kind for line in block.splitlines()]
    indented = _INDENTED.findall(_FENCED.sub("", text))
    return [Line(page.name, line) for line in (*fenced, *indented) if line.strip()]


LINES = [line for page in PAGES for line in lines(page)]
COMMANDS = [line for line in LINES if line.arguments is not None]
"""Those of diffc."""
