"""Passes of installed packages: found by name, left out and reported when they cannot be used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import passes
from passes.base import PassError, all_passes, broken_plugins, find_pass, register
from passes.pipeline import Pipeline
from passes.plugins import named
from tests.passes.graph_helpers import model, ops

PASS = '''
from dataclasses import dataclass
from typing import ClassVar
from passes import Pass, PassResult

@dataclass(frozen=True)
class Swap(Pass):
    """Exp becomes Abs."""
    name: ClassVar[str] = "{name}"
    op: str = "Abs"

    def run(self, graph):
        nodes = [node for node in graph.nodes if node.op == "Exp"]
        for node in nodes:
            node.op = self.op
        return PassResult(len(nodes))
'''


class Site:
    """A folder on sys.path into which packages are installed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self, package: str, code: str, **points: str) -> None:
        """Put module `package` with its metadata there, as pip does; `points` are its entry points."""
        (self.folder / f"{package}.py").write_text(code, encoding="utf-8")
        info = self.folder / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", "utf-8")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[passes]", *lines, ""]), "utf-8")
        importlib.invalidate_caches()
        named.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(passes.base, "_REGISTRY", all_passes())
    known = set(sys.modules)
    yield Site(tmp_path)
    named.cache_clear()
    for name in set(sys.modules) - known:
        if not name.startswith("passes."):
            del sys.modules[name]


def test_a_plugin_is_a_pass_like_ours(site: Site) -> None:
    site.install("swapper", PASS.format(name="swap-exp"), swap_exp="swapper:Swap")
    made = model("g (float[b] x) => (float[b] y) { y = Exp(x) }")
    result = Pipeline.parse("swap-exp{op=Neg}").run(made)
    assert ops(result.model) == ["Neg"]
    assert all_passes()["swap-exp"] is find_pass("swap-exp")
    assert broken_plugins() == ()


def test_nothing_is_imported_before_a_name_is_missing(site: Site) -> None:
    site.install("swapper", PASS.format(name="swap-exp"), swap_exp="swapper:Swap")
    site.install("other", PASS.format(name="swap-other"), swap_other="other:Swap")
    find_pass("fold-constants")
    assert "swapper" not in sys.modules
    find_pass("swap-exp")
    assert "swapper" in sys.modules
    assert "other" not in sys.modules


def test_two_packages_with_one_name_are_both_named(site: Site) -> None:
    for package in ("first", "second"):
        site.install(package, PASS.format(name="swap-exp"), swap_exp=f"{package}:Swap")
    with pytest.raises(PassError, match=r"'swap-exp'.*first 1\.0 and second 1\.0 both give this name"):
        find_pass("swap-exp")
    assert "swap-exp" not in all_passes()
    assert [plugin.packages for plugin in broken_plugins()] == [("first 1.0", "second 1.0")]


@pytest.mark.parametrize(
    ("code", "target", "reason"),
    [
        ("import no_such_library", "bad:Swap", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('no licence')", "bad:Swap", "RuntimeError: no licence"),
        ("x = 1", "bad:Swap", "AttributeError"),
        ("Swap = 3", "bad:Swap", "not a subclass of passes.base.Pass"),
        (PASS.format(name="other-name"), "bad:Swap", "its name is 'other-name'"),
    ],
)
def test_a_broken_plugin_breaks_nothing_else(site: Site, code: str, target: str, reason: str) -> None:
    site.install("bad", code, swap_exp=target)
    site.install("good", PASS.format(name="swap-good"), swap_good="good:Swap")
    assert "swap-good" in all_passes()
    assert "swap-exp" not in all_passes()
    (plugin,) = broken_plugins()
    assert (plugin.name, plugin.packages) == ("swap-exp", ("bad 1.0",))
    assert reason in plugin.reason
    with pytest.raises(PassError, match=r"pass 'swap-exp' is a plugin of bad 1\.0"):
        find_pass("swap-exp")


def test_a_plugin_cannot_take_the_name_of_a_pass_of_ours(site: Site) -> None:
    ours = find_pass("fold-constants")
    site.install("thief", PASS.format(name="fold-constants"), fold_constants="thief:Swap")
    assert all_passes()["fold-constants"] is ours
    assert "choose another name" in broken_plugins()[0].reason
    passes.base._REGISTRY.pop("fold-constants")  # as before its file is imported
    with pytest.raises(TypeError, match="taken"):
        register(importlib.import_module("thief").Swap)
