"""Modules that are written anew for a trace give the same bits as diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from diffc.models.rewrites import rewrite_modules


def test_chroma_modulation_is_bit_for_bit_the_same() -> None:
    module = ChromaCombinedTimestepTextProjEmbeddings(16, 20)
    for batch in (1, 2, 5):
        times = torch.rand(batch, generator=torch.Generator().manual_seed(batch)) * 1000
        expected = module(times)
        rewritten = ChromaCombinedTimestepTextProjEmbeddings(16, 20)
        rewrite_modules(rewritten)
        assert torch.equal(rewritten(times), expected)


@pytest.mark.parametrize(
    ("channels", "flip", "shift", "scale"), [(32, True, 0, 1), (33, False, 1, 1000), (8, True, 1, 1)]
)
def test_sinusoids_are_bit_for_bit_the_same(channels: int, flip: bool, shift: float, scale: int) -> None:
    times = torch.rand(5, generator=torch.Generator().manual_seed(7)) * 6000
    expected = Timesteps(channels, flip, shift, scale)(times)
    rewritten = Timesteps(channels, flip, shift, scale)
    rewrite_modules(rewritten)
    assert torch.equal(rewritten(times), expected)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shapes", [[[(1, 6, 9)]], [[(1, 5, 4), (1, 8, 3)]], [[(3, 7, 2)], [(3, 7, 2)]]])
def test_rotary_factors_of_qwen_image_are_the_same(centred: bool, shapes: list[Any]) -> None:
    module = QwenEmbedRope(10000, [16, 24, 24], scale_rope=centred)
    expected = module(shapes, max_txt_seq_len=13, device=torch.device("cpu"))
    rewrite_modules(module)
    found = module(shapes, max_txt_seq_len=13)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_frequencies_are_constants_of_the_graph() -> None:
    module = Timesteps(32, True, 0)
    rewrite_modules(module)
    program = torch.export.export(module, (torch.rand(3),))
    assert not [node for node in program.graph.nodes if "exp" in str(node.target).split(".")]
