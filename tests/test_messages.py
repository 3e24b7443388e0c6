"""Every error that a user can fix says how: the message has "Fix: ...", or names what it takes instead."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

ERRORS = ("DiffcError", "UsageError", "UnsupportedError", "PassError")
CHOICES = re.compile(r"Known|[Ee]xpected|Types: |asks for|Inputs: ")
"""Where a message tells what is taken, that is the fix."""
SAYS_ALL = re.compile(r"\bstr\(error\)|\{error\}'\)$|\{answer\[1\]\}'\)$|_AGAIN|_FIX|\bfix\}|_fits_nothing")
"""A message of another error goes on as it is; or a constant of the file has the fix."""
CONTRACTS = {
    f"passes/weights/{name}.py": "shapes that passes agree on among themselves: no file or option leads there"
    for name in ("deltas", "moves", "operations", "recipe", "stored")
} | dict.fromkeys(
    ("passes/files/bounded.py", "diffc/cache/plan_file.py"),
    "who reads the file knows where it comes from, and adds the fix (of_pass_error)",
)


def raised(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of every error that is made with a message."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and getattr(node.func, "id", "") in ERRORS:
            yield node.lineno, ast.unparse(node)


def lacks(text: str) -> bool:
    """Whether the source of an error tells no fix."""
    return not re.search(r"Fix: |\bfix=", text) and not CHOICES.search(text) and not SAYS_ALL.search(text)


@pytest.mark.parametrize("package", ["diffc", "passes"])
def test_errors_say_what_to_do(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in CONTRACTS
        for line, text in raised(ast.parse(path.read_text("utf-8")))
        if lacks(text)
    ]
    assert wrong == []


def test_the_rule_finds_what_it_is_for() -> None:
    without = "raise PassError(f'{path} is cut off')"
    assert [lacks(text) for _, text in raised(ast.parse(without))] == [True]
    fixed = ("PassError('x. Fix: y')", "DiffcError('x', fix='y')", "UsageError(f'unknown x. Known: {names}')")
    assert not any(lacks(text) for one in fixed for _, text in raised(ast.parse(one)))
    assert all(Path(ROOT, name).is_file() for name in CONTRACTS)
