"""Graphs as targets take them."""

from __future__ import annotations

from dataclasses import replace

from diffc.backends.target import TARGETS
from diffc.compile.graphs import passes_of
from passes.canonical.remove_unused import RemoveUnused
from passes.presets import TargetOptions, target_passes


def test_a_target_may_bring_its_own_passes() -> None:
    options = TargetOptions(tokens=64)
    assert passes_of(TARGETS["ort-cuda"], options) == target_passes("ort-cuda", options)
    added = replace(TARGETS["ort"], name="mine", passes=(RemoveUnused(),))
    assert passes_of(added, options) == (RemoveUnused(),)
