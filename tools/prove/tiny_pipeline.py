"""What a tiny pipeline of a class of diffusers is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 128}
UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
}
IMAGE_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 128,
}
WAN_VAE: dict[str, Any] = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@dataclass(frozen=True)
class Tiny:
    """A pipeline class with a small backbone: classes of diffusers by name, and their configurations.

    `text` names the encoder and tokenizer of each pair: "clip", "t5" or "llm" (a Llama of two layers). `more` holds
    other entries of model_index.json. `experts` are components of the backbone's class and configuration beside it.
    `others` are components without weights, and their classes; "" for one that the pipeline goes without.
    `vocabulary` is that of "llm", for a pipeline that writes token numbers by itself.
    """

    pipeline: str
    backbone: str
    config: Mapping[str, Any]
    text: tuple[str, ...]
    vae: str = "AutoencoderKL"
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)
    component: str = "transformer"
    more: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)
    vocabulary: int = 128
