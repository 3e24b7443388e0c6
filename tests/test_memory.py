"""The most memory that this process has held."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffc.errors import UsageError
from diffc.memory import check_room, peak_rss
from diffc.models.embedded.tiny import SD3
from diffc.models.inputs import random_inputs
from diffc.models.registry import FAMILIES
from diffc.models.spec import Shape

GROWS = (
    "from diffc.memory import peak_rss; a = peak_rss(); b = bytearray(96 << 20); del b; print(a, peak_rss())"
)


def test_it_grows_with_what_was_held_and_never_shrinks() -> None:
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 90 << 20 < after - before < 120 << 20
    mine = peak_rss()
    assert mine is not None
    assert mine > 10 << 20


def test_what_does_not_fit_is_refused_before_it_is_asked_for() -> None:
    check_room(1 << 20, "a little", fix="none")
    with pytest.raises(UsageError, match="too much takes 1125899"):
        check_room(1 << 50, "too much", fix="ask for less")


def test_inputs_are_held_against_memory() -> None:
    config = SD3 | {"_class_name": "SD3Transformer2DModel"}
    shape = Shape(1, 64, 64, 10**11)
    with pytest.raises(UsageError, match="the inputs at batch 1"):
        random_inputs(FAMILIES["sd3"], config, shape, dtype=torch.float32, seed=0)
