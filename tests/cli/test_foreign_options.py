"""Options of the scripts that people come from: each is one of diffc's, or is refused with what to write."""

from __future__ import annotations

import re

import pytest

from diffc.cli.foreign_options import INSTEAD
from diffc.cli.main import run
from tests import ROOT as SOURCES
from tests.cli.test_command import COMMANDS
from tests.cli_helpers import Capture

OURS = {
    " ".join(path): {name for param in command.params for name in param.opts} for path, command in COMMANDS
}
_SPAN, _OPTION = re.compile(r"`([^`]*)`"), re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")


def foreign() -> list[str]:
    """Every option in the first column of the tables of docs/migration.md."""
    page = (SOURCES / "docs" / "migration.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    spans = [span for cell in cells for span in _SPAN.findall(cell)]
    return sorted({option for span in spans for option in _OPTION.findall(span)})


@pytest.mark.parametrize("option", foreign())
def test_the_first_try_names_what_to_write(option: str, capsys: Capture) -> None:
    if option not in INSTEAD:
        assert any(option in options for options in OURS.values()), "neither ours, nor told"
        return
    name = next(name for name in ("compile", "generate", "opt") if option not in OURS[name])
    assert run([name, "MODEL", option, "-o", "out"]) == 2
    said, told = capsys.readouterr().err, INSTEAD[option]
    assert f"No such option: {option}" in said
    assert (
        f"Fix: leave it out: {told[9:]}" if told.startswith("nothing: ") else f"Fix: write {told}"
    ) in said


@pytest.mark.parametrize("option", INSTEAD)
def test_what_is_told_exists(option: str) -> None:
    told = INSTEAD[option]
    if told.startswith("nothing: "):
        return
    places = {name: found.start() for name in OURS if (found := re.search(rf"\b{name} ", f"{told} "))}
    command = min(places, key=places.__getitem__)
    assert set(_OPTION.findall(told)) <= OURS[command]
