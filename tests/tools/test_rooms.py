"""`tools` is a package on top of the two others: nothing imports it but tests, and its files form no circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, in full; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write the import in full"
            yield from (str(node.module), *(f"{node.module}.{item.name}" for item in node.names))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(file) for file in TOOLS}


def test_tools_form_no_circle() -> None:
    files = {name_of(file): file for file in TOOLS}
    arrows = {name: {other for other in imported(file) if other in files} for name, file in files.items()}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(files)  # raises CycleError
    assert arrows["tools.compat.main"] >= {"tools.compat.catalogue", "tools.compat.table"}


@pytest.mark.parametrize("package", ["diffc", "passes"])
def test_the_packages_do_not_import_tools_or_tests(package: str) -> None:
    for file in sorted((ROOT / package).rglob("*.py")):
        assert not [name for name in imported(file) if name.split(".")[0] in ("tools", "tests")], file


def test_no_file_changes_the_path_of_imports() -> None:
    written = "sys." + "path.insert"
    for file in [*TOOLS, *sorted((ROOT / "tests").rglob("*.py"))]:
        assert written not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("document", [*DOCUMENTS, *TOOLS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for module in re.findall(r"python3? -m (tools\.[\w.]*\w)", text):
        assert {module, f"{module}.__main__"} & NAMES, module
    for name in re.findall(r"\btools[/\\][\w/\\]+\.(?:py|txt|json)\b", text):
        assert (ROOT / name.replace("\\", "/")).exists(), name
