"""Modules that are written anew for a trace give the same bits as diffusers' own."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_chroma import ChromaCombinedTimestepTextProjEmbeddings

from diffc.frontend.rewrites import rewrite_modules


def test_chroma_modulation_is_bit_for_bit_the_same() -> None:
    module = ChromaCombinedTimestepTextProjEmbeddings(16, 20)
    for batch in (1, 2, 5):
        times = torch.rand(batch, generator=torch.Generator().manual_seed(batch)) * 1000
        expected = module(times)
        rewritten = ChromaCombinedTimestepTextProjEmbeddings(16, 20)
        rewrite_modules(rewritten)
        assert torch.equal(rewritten(times), expected)
