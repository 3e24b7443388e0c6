"""Every file, pass, extra, option and message that the documents name exists."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests import ROOT
from tests.documents import DOCUMENTS, LINES

VERBS = (
    "fold|remove|split|decompose|widen|smooth|fuse|share|rewrite|emulate|normalize|match|type|merge|join|lift"
)


def test_tools_that_documents_call_have_these_options() -> None:
    for line in LINES:
        if line.text.startswith("python -m tools."):
            name = line.words[2].split(".")
            place = ROOT.joinpath(*name).with_suffix(".py")
            source = (place if place.is_file() else ROOT.joinpath(*name, "main.py")).read_text(
                encoding="utf-8"
            )
            for option in (word for word in line.words if word.startswith("--")):
                assert f'"{option}"' in source, line


def test_the_install_commands_name_real_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"pip install [^\n]*?\.\[([\w,]+)\]", "\n".join(line.text for line in LINES))
    assert len(extras) >= 4
    for named in extras:
        assert set(named.split(",")) <= set(project["optional-dependencies"])
    assert (ROOT / "tools" / "constraints.txt").is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_files_and_passes_named_in_documents_exist(document: Path) -> None:
    from passes import all_passes

    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:diffc|passes|tools|docs|tests)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:models|backends|quantize|frontend|validate)/[\w/.]+)`", text):
        assert (ROOT / "diffc" / name).exists(), name
    for name in re.findall(rf"(?<![-\w.])((?:{VERBS})-[a-z0-9]+(?:-[a-z0-9]+)?)\b", text):
        assert name in all_passes(), name
    made = {"commands.md", "passes.md"}  # of the site, by tools/pages/site.py
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / target).exists() or target in made, target


def test_the_examples_for_contributors_are_files_that_tests_install() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    examples = re.findall(r"^<!-- (\S+) -->\n```\w+\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) == 6
    for name, code in examples:
        assert name.startswith("tests/plugin_package/")
        assert (ROOT / name).read_text(encoding="utf-8") == code, f"copy {name} into CONTRIBUTING.md"
    assert re.findall(r"^```\n(python3 .*)\n", text, re.MULTILINE) == ["python3 tools/run.py test --fast"]


def said() -> str:
    """Every string of the code, one a line, with a gap where a value goes in."""
    texts = []
    for room in ("diffc", "passes"):
        for file in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(" ".join(node.value.split()))
    return "\n".join(texts)


# What a message fills in: names in quotes, numbers, and words that the page gives as examples.
_FILLED = re.compile(
    r"'[^']*'|\bSM\d+\b|\.\.\.|\btrt-rtx\b|\btensorrt_rtx\b|\btext_encoder_3\b|\bflux-dev\b|\bort\b|[:;,]"
)


def test_messages_that_troubleshooting_quotes_are_said() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(quoted) > 25
    code = said()
    pieces = [(text, " ".join(piece.split())) for text in quoted for piece in _FILLED.split(text)]
    assert not [(text, piece) for text, piece in pieces if len(piece.split()) > 1 and piece not in code]
