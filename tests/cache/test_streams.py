"""Plans on backbones that were read off their pipelines: LTX-Video and WAN keep what their blocks add."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffc import cache

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4}


def ltx() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=24, caption_channels=8, **HEADS
    )
    sizes = {"num_frames": 2, "height": 2, "width": 3, "encoder_attention_mask": torch.ones(1, 5)}
    return model.eval(), {
        "hidden_states": torch.randn(1, 12, 4),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        **sizes,
    }


def wan() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(3)
    model = diffusers.WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, **HEADS
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 2, 4, 6),
        "encoder_hidden_states": torch.randn(1, 5, 8),
    }


@pytest.mark.parametrize(("made", "blocks"), [(ltx, "transformer_blocks"), (wan, "blocks")])
def test_what_inner_blocks_add_is_kept(made: Any, blocks: str) -> None:
    model, inputs = made()
    (group,) = cache.resolve(cache.preset("blocks:every=2", model), model).groups
    assert (group.blocks, group.keep) == ((f"{blocks}.1", f"{blocks}.2"), "residual")

    def call(time: float) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(timestep=torch.tensor([time]), return_dict=False, **inputs)[0]
            return found

    first, second = call(900.0), call(600.0)
    with cache.apply(model, "blocks:every=2") as applied:
        assert torch.equal(call(900.0), first)
        inputs["hidden_states"] = inputs["hidden_states"] + 0  # new latents, as in each step
        kept = call(600.0)
        assert applied.report().reused == 1
    assert not torch.equal(kept, second)
    stale = torch.linalg.norm(kept - second) / torch.linalg.norm(second)
    assert stale < torch.linalg.norm(first - second) / torch.linalg.norm(second)
