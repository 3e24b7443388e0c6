"""Small backbones of every family with seeded weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from diffc.models.embedded import tiny
from diffc.quantize.convert import enabled_quantizers
from diffc.quantize.kinds import kind_of
from diffc.quantize.simulate import cpu_block_quant
from diffc.quantize.state import settings_of, usable_amax

BACKBONES = {
    "sd3": (diffusers.SD3Transformer2DModel, tiny.SD35 | {"num_layers": 2}),
    "flux": (diffusers.FluxTransformer2DModel, tiny.FLUX | {"num_layers": 1, "num_single_layers": 2}),
    "sdxl": (diffusers.UNet2DConditionModel, tiny.SDXL),
}


def backbone_of(family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> nn.Module:
    torch.manual_seed(11)
    cls, config = BACKBONES[family]
    backbone = cls(**(config | changed)).eval()
    return backbone if dtype == torch.float32 else backbone.to(dtype)  # torch cannot cast fake parameters


def inputs_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator, config = torch.Generator().manual_seed(seed), BACKBONES[family][1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    if family == "sd3":
        return {
            "hidden_states": normal(2, 16, 8, 8),
            "encoder_hidden_states": normal(2, 5, config["joint_attention_dim"]),
            "pooled_projections": normal(2, config["pooled_projection_dim"]),
            "timestep": torch.tensor([500.0, 20.0]),
        }
    if family == "flux":
        return {
            "hidden_states": normal(1, 16, 64),
            "encoder_hidden_states": normal(1, 5, config["joint_attention_dim"]),
            "pooled_projections": normal(1, config["pooled_projection_dim"]),
            "timestep": torch.tensor([0.5]),
            "guidance": torch.tensor([3.5]),
            "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], dim=1),
            "txt_ids": torch.zeros(5, 3),
        }
    text = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "sample": normal(1, 4, 8, 8),
        "timestep": torch.tensor(300.0),
        "encoder_hidden_states": normal(1, 5, config["cross_attention_dim"]),
        "added_cond_kwargs": {"text_embeds": normal(1, text), "time_ids": normal(1, 6)},
    }


def forward(backbone: nn.Module, family: str, seed: int = 1) -> torch.Tensor:
    dtype = next(backbone.parameters()).dtype
    with torch.no_grad(), cpu_block_quant():
        return backbone(**inputs_of(family, seed, dtype), return_dict=False)[0]


def make_portable(backbone: nn.Module) -> None:
    """Give every quantizer the amax that a checkpoint keeps of it (`state.portable`)."""
    for name, quantizer in enabled_quantizers(backbone).items():
        amax = getattr(quantizer, "_amax", None)
        kind = kind_of(settings_of(quantizer.get_modelopt_state()))
        if amax is not None:
            quantizer.reset_amax()
            quantizer.amax = usable_amax(name, amax, kind)
