"""config.json read off shapes: a backbone made from it has the tensors of the one that the shapes were taken of."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from diffc.models.single.convert import config_of
from diffc.models.single.layouts import LAYOUTS, converter_of, layout_of
from passes.weights.recipe import Recipe, Source

STREAM = {"num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 48}
SINGLE = {**STREAM, "num_single_layers": 2, "axes_dims_rope": (16, 8, 8)}
WAN = {"num_attention_heads": 1, "attention_head_dim": 128, "ffn_dim": 64, "num_layers": 2, "text_dim": 32}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1": ("FluxTransformer2DModel", {**SINGLE, "pooled_projection_dim": 24, "guidance_embeds": True}),
    "FLUX.1 fill": ("FluxTransformer2DModel", {**SINGLE, "in_channels": 384, "out_channels": 64}),
    "FLUX.2": (
        "Flux2Transformer2DModel",
        {**STREAM, "num_single_layers": 2, "in_channels": 16, "axes_dims_rope": (8, 8, 8, 8)},
    ),
    "Chroma": (
        "ChromaTransformer2DModel",
        {**SINGLE, "approximator_hidden_dim": 40, "approximator_layers": 2},
    ),
    "Qwen-Image": ("QwenImageTransformer2DModel", {**STREAM, "axes_dims_rope": (16, 8, 8)}),
    "SD3": (
        "SD3Transformer2DModel",
        {"num_layers": 2, "num_attention_heads": 1, "joint_attention_dim": 48, "caption_projection_dim": 64}
        | {"pooled_projection_dim": 24, "pos_embed_max_size": 12, "dual_attention_layers": (0,)},
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        {"dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 48}
        | {"axes_dims": [16, 8, 8], "axes_lens": [64, 32, 32]},
    ),
    "Wan": ("WanTransformer3DModel", WAN),
    "Wan from an image": (
        "WanTransformer3DModel",
        {**WAN, "in_channels": 36, "image_dim": 40, "added_kv_proj_dim": 128},
    ),
    "LTX": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 2, "num_attention_heads": 2, "cross_attention_dim": 128, "caption_channels": 48}
        | {"in_channels": 16, "out_channels": 16},
    ),
    "Lumina": (
        "Lumina2Transformer2DModel",
        {"hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2}
        | {"num_kv_heads": 1, "axes_dim_rope": (16, 8, 8), "cap_feat_dim": 1024},
    ),
    "SD 1": ("UNet2DConditionModel", {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 48}),
    "SD 2": (
        "UNet2DConditionModel",
        {"block_out_channels": (64, 128, 128, 128), "cross_attention_dim": 48, "use_linear_projection": True}
        | {"attention_head_dim": (1, 2, 2, 2)},
    ),
}


def shapes_of(kind: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = getattr(diffusers, kind).from_config({k: v for k, v in config.items() if k != "_class_name"})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", SMALL)
def test_a_backbone_of_the_config_has_the_shapes(name: str) -> None:
    kind, config = SMALL[name]
    shapes = shapes_of(kind, config)
    layout = layout_of(shapes)
    assert layout is not None
    assert layout.kind == kind
    weights = {key: Recipe.of_source(Source("raw", "", 1, shape)) for key, shape in shapes.items()}
    assert shapes_of(kind, config_of(layout, weights, "file")) == shapes


def test_every_layout_has_a_converter_and_names_of_its_own() -> None:
    for layout in LAYOUTS:
        assert callable(converter_of(layout))
        assert layout_of(layout.original or layout.diffusers) is layout
        assert layout_of(layout.diffusers) is layout
