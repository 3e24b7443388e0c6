"""Commands in messages install what they name: libraries at our versions, and never a diffc from an index."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from diffc.backends import install
from diffc.backends.install import RTX_PROVIDER, install_command, packages_of
from tests import ROOT
from tools.optimum import env

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
OURS = [
    Requirement(text)
    for texts in EXTRAS.values()
    for text in (*PROJECT["dependencies"], *texts, RTX_PROVIDER)
]
PINS = {requirement.name: requirement for requirement in OURS}
_UNPINNED = {"onnx", "modelopt", "pre-commit"}
_TEXTS = [
    *(path for room in ("diffc", "passes", "tools") for path in sorted((ROOT / room).rglob("*.py"))),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tools/constraints.txt")),
]


def commands(text: str) -> list[list[str]]:
    """The words after each `pip install`, up to what ends the command."""
    found = re.findall(r"pip install ((?:(?:\"[^\"]*\"|[^\s;`'\"#),|&]+) ?)+)", text)
    return [re.findall(r"\"[^\"]*\"|\S+", words) for words in found]


def faults(words: list[str]) -> list[str]:
    """What cannot be installed, or is not what diffc is tested with."""
    wrong, skip = [], False
    for word in (word.strip('"') for word in words):
        if skip or word.startswith("-") or "{" in word or word.isupper():
            skip = word in ("-c", "-r", "--index-url", "--extra-index-url")
        elif word.startswith("."):
            extras = re.findall(r"[\w-]+", word.partition("[")[2])
            wrong += [f"{word}: no extra {extra}" for extra in extras if extra not in EXTRAS]
        elif not re.fullmatch(r"[A-Za-z][\w.-]*(\[[\w,]+\])?([<>=!~].*)?", word):
            break  # prose after the command
        else:
            wrong += fault_of(Requirement(word))
    return wrong


def fault_of(wanted: Requirement) -> list[str]:
    if wanted.name == "diffc":
        return ["diffc is on no index"]
    if wanted.name in _UNPINNED:
        return []
    if wanted.name not in PINS:
        return [f"{wanted.name} is nothing that diffc declares"]
    pin = PINS[wanted.name].specifier
    loose = not wanted.specifier and "==" not in str(pin)
    return [] if loose or wanted.specifier == pin else [f"{wanted} is not {PINS[wanted.name]}"]


def texts_of(path: Path) -> list[str]:
    """The strings of a Python file, joined as Python joins them; other files whole."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [re.sub(r"(?m)^#\s*", "", content)]
    nodes = ast.walk(ast.parse(content))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_every_pip_command_works_outside_of_a_checkout_or_says_that_it_needs_one() -> None:
    seen = 0
    for path in _TEXTS:
        for text in texts_of(path):
            for words in commands(text.replace('`pip install "diffc[rtx]"` would fail', "")):
                seen += 1
                assert not faults(words), f"{path}: pip install {' '.join(words)}"
    assert seen > 8


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ('pip install "diffc[trt]"', "on no index"),
        ("pip install --upgrade diffc", "on no index"),
        ('pip install ".[trtx]"', "no extra trtx"),
        ("pip install tensorrt-rtx==1.6", "is not tensorrt-rtx==1.7"),
        ("pip install tensor-rtx", "nothing that diffc declares"),
    ],
)
def test_a_command_that_would_fail_is_found(command: str, fault: str) -> None:
    (words,) = commands(f"Fix: {command}")
    assert fault in faults(words)[0]


def test_extras_are_installed_by_the_names_of_their_packages() -> None:
    assert packages_of("rtx") == EXTRAS["rtx"][-1:]
    assert install_command("cpu", "rtx") == f'pip install "{EXTRAS["cpu"][-1]}" "{EXTRAS["rtx"][-1]}"'


def test_a_module_of_what_compiles_is_named_with_all_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = [f'{text}; extra == "compile"' for text in EXTRAS["compile"]]
    monkeypatch.setattr(install.metadata, "requires", lambda name: [*PROJECT["dependencies"], *declared])
    error = install.missing("modelopt.torch")
    assert error is not None
    assert "needs nvidia-modelopt" in error.what
    (words,) = commands(error.fix)
    assert len(words) == len(EXTRAS["compile"])
    assert not faults(words)
    assert install.missing("PIL") is not None
    assert install.missing("numpy") is None
    assert install.missing("diffc.nothing") is None


def test_an_uninstalled_diffc_has_no_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> list[str]:
        raise install.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(install.metadata, "requires", nowhere)
    assert install.requirements() == []


def test_the_provider_is_the_one_of_the_pipelines_environment() -> None:
    assert env.RTX == RTX_PROVIDER
