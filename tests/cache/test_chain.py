"""One step of a chain: which parts run, and what is kept for the steps that leave some out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from diffc.cache.chain import run_chain
from diffc.cache.layout import KeptTensor


@dataclass(frozen=True)
class Stage:
    """x -> name: a function of what flows."""

    group: int | None
    gives: tuple[str, ...]


PARTS = (Stage(None, ("a",)), Stage(0, ("b",)), Stage(1, ("c",)), Stage(None, ("y",)))
KEPT = (KeptTensor("b", 0, None), KeptTensor("c", 1, "b"))


class Runner:
    """a = 2 x; b = a + 1; c = b + 10 a; y = c - b; and which parts ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, part: Stage, flow: Mapping[str, Any]) -> dict[str, Any]:
        (name,) = part.gives
        self.ran.append(name)
        made = {
            "a": lambda: 2 * flow["x"],
            "b": lambda: flow["a"] + 1,
            "c": lambda: flow["b"] + 10 * flow["a"],
            "y": lambda: flow["c"] - flow["b"],
        }
        return {name: made[name]()}


def step(x: float, reuse: set[int], held: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    runner = Runner()
    found = run_chain(PARTS, KEPT, reuse, {"x": np.array([x])}, held, runner)
    return found, runner.ran


def test_a_whole_step_keeps_what_others_may_take() -> None:
    held: dict[str, Any] = {}
    found, ran = step(3.0, set(), held)
    assert ran == ["a", "b", "c", "y"]
    assert (found["y"].item(), found["x"].item()) == (60.0, 3.0)
    assert {name: value.item() for name, value in held.items()} == {"b": 7.0, "c": 60.0}  # c less b


@pytest.mark.parametrize(
    ("reuse", "ran", "b", "c"),
    [
        ({0, 1}, ["a", "y"], 7.0, 67.0),  # both as they were
        ({0}, ["a", "c", "y"], 7.0, 7.0 + 10 * 10.0),  # b of before, c of now
        ({1}, ["a", "b", "y"], 11.0, 11.0 + 60.0),  # what c added before, to b of now
        ({2}, ["a", "b", "c", "y"], 11.0, 111.0),  # a group that the chain does not have
    ],
)
def test_a_step_that_leaves_parts_out(reuse: set[int], ran: list[str], b: float, c: float) -> None:
    held: dict[str, Any] = {}
    step(3.0, set(), held)
    found, did = step(5.0, reuse, held)
    assert did == ran
    assert (found["b"].item(), found["c"].item(), found["y"].item()) == (b, c, c - b)
    assert held["b"].item() == b  # what ran replaces what was kept
    assert held["c"].item() == c - b
