"""diffc/compile/lora_slots.py: the TensorRT-RTX builder on a graph with slots, for a range of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffc.backends.profile import Profile
from passes.targets.ort.lora_slots import with_lora_slots
from tests.networks import build
from tests.passes.targets.ort.test_lora_slots import GRAPHS, graph


@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_tensorrt_rtx_builds_branches_of_a_range_of_ranks(kind: str, tmp_path: Path) -> None:
    """Factors as inputs. Rank 1, of zeros, is the least: no dimension of a profile is empty."""
    pytest.importorskip("tensorrt_rtx")
    slotted, slots = with_lora_slots(graph(GRAPHS[kind]))
    (slot,) = slots.values()
    empty = [tensor for tensor in slotted.graph.initializer if tensor.name in (slot.a, slot.b)]
    for tensor in empty:
        slotted.graph.initializer.remove(tensor)
    assert len(empty) == 2
    low, usual, high = (
        {"x": (batch, 6), slot.a: (6, rank), slot.b: (rank, 8)} for batch, rank in ((1, 1), (2, 16), (4, 64))
    )
    report = build(tmp_path, slotted, (89, 120), profiles=(Profile.of_shapes(low, usual, high),))
    assert report.nbytes > 0
    assert report.sms == (89, 120)
