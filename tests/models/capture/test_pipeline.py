"""What model_index.json names: components, and values that are lists as well."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from diffc.models.capture.pipeline import is_component
from diffc.models.capture.stand_ins import Backbone


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (["diffusers", "AutoencoderKL"], True),
        ([None, None], True),
        ([1, 2], False),
        ([2, 5, 8], False),
        (["a", "b", "c"], False),
        (True, False),
        (None, False),
    ],
)
def test_lists_of_values_are_no_components(entry: Any, expected: bool) -> None:
    assert is_component(entry) is expected


def test_the_stand_in_notes_how_many_blocks_a_pipeline_counted() -> None:
    real = nn.Module()
    real.blocks = nn.ModuleList(nn.Identity() for _ in range(5))
    stand_in = Backbone(real)
    assert len(stand_in.blocks) == 5
    assert stand_in.read == {"blocks": [None] * 5}
