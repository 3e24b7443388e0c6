"""Backbones that are written for a whole batch give what diffusers' own forward() gives image by image."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import Lumina2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from diffc.models.batched import FORWARDS
from diffc.models.embedded.tiny_weights import seed_weights

LUMINA2: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "cap_feat_dim": 24,
    "axes_dim_rope": (16, 16, 16),
    "axes_lens": (64, 64, 64),
    "multiple_of": 16,
}
Z_IMAGE: dict[str, Any] = {
    "dim": 96,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": (16, 16, 16),
    "axes_lens": (256, 64, 64),
}


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rewritten(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    found.forward = FORWARDS[type(model).__name__](found)
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    assert float(expected.std()) > 0.01
    return bool((found - expected).norm() < 2e-6 * expected.norm())


@pytest.mark.parametrize("lengths", [(17, 5, 11), (8, 8, 8), (1, 17, 17)])
def test_lumina2(lengths: tuple[int, ...]) -> None:
    model = Lumina2Transformer2DModel(**LUMINA2).eval()
    seed_weights(model, "lumina2")
    mask = (torch.arange(17)[None] < torch.tensor(lengths)[:, None]).long()
    arguments = (
        drawn(3, 4 if model.config.in_channels == 4 else 16, 12, 20, seed=1),
        torch.tensor([0.2, 0.7, 0.9]),
    )
    with torch.no_grad():
        expected = model(*arguments, drawn(3, 17, 24, seed=2), mask).sample
        found = rewritten(model)(*arguments, drawn(3, 17, 24, seed=2), mask).sample
    assert close(found, expected)


@pytest.mark.parametrize(("height", "lengths"), [(12, (40, 7, 64)), (16, (33, 33, 33)), (10, (5, 31, 2))])
def test_z_image(height: int, lengths: tuple[int, ...]) -> None:
    model = ZImageTransformer2DModel(**Z_IMAGE).eval()
    seed_weights(model, "z-image")
    x, times = drawn(3, 16, 1, height, 20, seed=3), torch.tensor([0.1, 0.5, 0.95])
    texts = [drawn(length, 24, seed=n) for n, length in enumerate(lengths)]
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    with torch.no_grad():
        expected = torch.stack(model(list(x.unbind()), times, texts).sample)
        found = rewritten(model)(x, times, padded, torch.tensor(lengths)).sample
    assert close(found, expected)
