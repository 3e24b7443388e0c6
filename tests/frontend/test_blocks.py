"""Runs of equal blocks: found, and taken out for the time of a trace."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffc.frontend.blocks import KEPT, find_runs, shortened
from diffc.frontend.trace import _with_copied_blocks
from diffc.models.registry import find_family
from diffc.models.sources.backbone import build_backbone
from tests.frontend.block_networks import Network, chain
from tools.bench.profile_trace import FLUX_DEV


def test_flux_dev_traces_6_of_57_blocks() -> None:
    with FakeTensorMode():
        backbone: Any = build_backbone(find_family("flux"), FLUX_DEV, torch.bfloat16)
        runs = find_runs(backbone)
        with shortened(backbone, runs):
            left = [
                n
                for n, _ in backbone.named_modules()
                if re.fullmatch(r"(single_)?transformer_blocks\.\d+", n)
            ]
        assert len(backbone.transformer_blocks) == 19
    assert [(run.first, run.last) for run in runs] == [(0, 18), (0, 37)]
    assert len(left) == 2 * KEPT
    assert sum(len(run.left_out) for run in runs) == 57 - len(left)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda blocks: setattr(blocks[3], "slope", 0.2), []),
        (lambda blocks: setattr(blocks[0], "slope", 0.2), [(1, 6)]),
        (lambda blocks: setattr(blocks[6].linear, "bias", None), [(0, 5)]),
        (lambda blocks: blocks[5].double(), [(0, 4)]),
        (lambda blocks: blocks[2].register_forward_hook(lambda *_: None), [(3, 6)]),
        (lambda blocks: setattr(blocks[1], "linear", nn.Identity()), [(2, 6)]),
        (lambda blocks: setattr(blocks[6], "options", {"a": (1, 2)}), [(0, 5)]),
        (lambda blocks: setattr(blocks[6].linear, "weight", blocks[1].linear.weight), []),
        (lambda blocks: None, [(0, 6)]),
    ],
)
def test_only_equal_blocks_are_a_run(
    damage: Callable[[Any], object], expected: list[tuple[int, int]]
) -> None:
    network = Network(chain)
    damage(network.blocks)
    assert [(run.first, run.last) for run in find_runs(network)] == expected


def test_lists_that_are_read_by_number_are_traced_whole() -> None:
    backbone = nn.Module()
    backbone.projections = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    assert find_runs(backbone)
    assert _with_copied_blocks(backbone, lambda: backbone.projections[2]) is None
    assert len(backbone.projections) == 5
