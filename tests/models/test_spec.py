"""The words of a family: what an ONNX file says of a backbone, and sizes in latents."""

from __future__ import annotations

import pytest

from diffc.models.spec import GraphFacts, Shape, latent_sizes

FACTS = GraphFacts({"sample": ("batch", 16, "height", 0)}, ("batch", 4, "height"), {"proj.weight": (64, 32)})


def test_sizes_are_read_where_they_are_fixed() -> None:
    assert FACTS.size("sample", 1) == 16
    for axis in (0, 2, 3):  # names, and a size that is none
        with pytest.raises(LookupError, match=f"axis {axis} of sample is dynamic"):
            FACTS.size("sample", axis)
    assert [FACTS.output_size(axis, 7) for axis in (0, 1, 2, 3)] == [7, 4, 7, 7]
    assert [FACTS.weight("proj.weight", axis, 7) for axis in (0, 1, 2)] == [64, 32, 7]
    assert FACTS.weight("gone", 0, 7) == 7


def test_shapes_are_for_people_and_in_latents() -> None:
    shape = Shape(2, 512, 768, 77)
    assert str(shape) == "batch 2, 512x768 px, 77 tokens"
    assert latent_sizes(shape) == {"batch": 2, "height": 64, "width": 96, "text": 77}
