"""Modules that are written anew for a trace give the same bits as diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

from diffc.models.embedded.tiny_weights import seed_weights
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


@pytest.mark.parametrize(("frames", "lengths"), [(2, (9, 4, 1)), (1, (9, 9, 9))])
def test_mochi_for_a_batch_is_the_same(frames: int, lengths: tuple[int, ...]) -> None:
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=24,
        text_embed_dim=32,
        time_embed_dim=16,
    ).eval()
    seed_weights(model, "mochi")
    generator = torch.Generator().manual_seed(frames)
    arguments = (
        torch.randn(3, 12, frames, 6, 10, generator=generator),
        torch.randn(3, 9, 32, generator=generator),
        torch.tensor([100.0, 500.0, 900.0]),
        torch.arange(9)[None] < torch.tensor(lengths)[:, None],
    )
    with torch.no_grad():
        expected = model(*arguments).sample
        rewrite_modules(model)
        found = model(*arguments).sample
    assert float(expected.std()) > 0.01
    assert float((found - expected).norm()) < 3e-6 * float(expected.norm())
