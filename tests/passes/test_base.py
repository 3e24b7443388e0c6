"""Passes by name, bodies in their order, and the collector while a graph is built."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import ClassVar

import pytest

from passes.base import (
    RENAMED,
    Pass,
    PassError,
    PassResult,
    Refusal,
    all_passes,
    bodies_of,
    collector_paused,
    find_pass,
    register,
    walk,
)
from tests.passes.graph_helpers import graph_of

NESTED = """g (float[4] x, bool c) => (float[4] y) {
    y = If (c) <
        then_branch = outer () => (float[4] p) {
            p = If (c) <
                then_branch = inner () => (float[4] r) { r = Neg(x) },
                else_branch = other () => (float[4] s) { s = Abs(x) }
            >
        },
        else_branch = e () => (float[4] q) { q = Relu(x) }
    >
}"""


def test_a_pass_is_found_by_its_name_alone() -> None:
    known = all_passes()
    assert list(known) == sorted(known)
    for name, cls in known.items():
        assert find_pass(name) is cls
        assert cls.name == name
    with pytest.raises(PassError, match=r"unknown pass 'fuse-all'\. Known passes: add-trt-functions, "):
        find_pass("fuse-all")


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_gives_the_pass_and_a_warning(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"'{old}' is called '{new}' now"):
        assert find_pass(old) is find_pass(new)


@pytest.mark.parametrize("taken", ["fuse-qdq", ""])
def test_a_name_is_given_once(taken: str) -> None:
    @dataclass(frozen=True)
    class Mine(Pass):
        name: ClassVar[str] = taken

    with pytest.raises(TypeError, match="is empty or taken"):
        register(Mine)
    assert find_pass("fuse-qdq") is not Mine


def test_a_pass_without_run_says_so() -> None:
    @dataclass(frozen=True)
    class Empty(Pass):
        name: ClassVar[str] = "empty"

    with pytest.raises(TypeError, match=r"Empty does not define run\(\) for g"):
        Empty().run(graph_of("g (float[4] x) => (float[4] y) { y = Neg(x) }"))
    assert not Empty().drops_outputs


def test_bodies_come_after_what_they_are_in() -> None:
    graph = graph_of(NESTED)
    assert [part.name for part in walk(graph)] == ["g", "outer", "inner", "other", "e"]
    assert [part.name for part in bodies_of(graph)] == ["outer", "e"]


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_afterwards(on: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        with pytest.raises(KeyError), collector_paused():
            raise KeyError(gc.isenabled())
        with collector_paused(), collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()


def test_results_say_nothing_unless_something_happened() -> None:
    assert PassResult() == PassResult(0, (), ())
    assert PassResult(refusals=(Refusal("n", "why"),)).refusals[0].node == "n"
