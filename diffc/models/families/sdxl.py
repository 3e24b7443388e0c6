"""Stable Diffusion XL: a UNet of residual convolutions and cross attention, with size and pooled-text conditions."""

from __future__ import annotations

from typing import Any

from diffc.models.family import Family, Optimum
from diffc.models.spec import VAE_SCALE, Config, DimSpec, GraphFacts, InputSpec, Shape, latent_sizes


def _pooled_width(config: Config) -> int:
    """Width of text_embeds: what is left of the embedding's input beside six sizes (UNet2DConditionModel)."""
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


def _inputs(config: Config) -> tuple[InputSpec, ...]:
    condition = "added_cond_kwargs"
    return (
        InputSpec("sample", ("batch", config["in_channels"], "height", "width")),
        InputSpec("timestep", (), "float32", "timestep"),
        InputSpec("encoder_hidden_states", ("batch", "text", config["cross_attention_dim"])),
        InputSpec("text_embeds", ("batch", _pooled_width(config)), path=(condition, "text_embeds")),
        InputSpec("time_ids", ("batch", 6), "float32", "time_ids", path=(condition, "time_ids")),
    )


def _downscale(config: Config) -> int:
    """Every level but the last halves the image; skip connections meet only when it divides evenly."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _dims(config: Config) -> tuple[DimSpec, ...]:
    multiple = _downscale(config)
    # From batch 64 on, diffusers' Upsample2D takes another path, which one graph cannot hold.
    return DimSpec("batch", 1, 63), DimSpec("height", multiple), DimSpec("width", multiple), DimSpec("text")


def _native(config: Config) -> Shape:
    pixels = config["sample_size"] * VAE_SCALE
    return Shape(2, pixels, pixels, 77)


_WIDTHS = (320, 640, 1280)
"""Channels of the levels of released models."""


def _config_of(facts: GraphFacts) -> dict[str, Any]:
    channels, pooled = facts.size("sample", 1), facts.size("text_embeds", 1)
    embedded = facts.weight("add_embedding.linear_1.weight", 1, pooled + 6 * 256)
    levels = tuple(
        facts.weights[name][0]
        for name in (f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(8))
        if name in facts.weights
    )
    return {
        "sample_size": 128,
        "in_channels": channels,
        "out_channels": facts.output_size(1, facts.weight("conv_out.weight", 0, channels)),
        "cross_attention_dim": facts.size("encoder_hidden_states", 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (embedded - pooled) // 6,
        "projection_class_embeddings_input_dim": embedded,
        "block_out_channels": list(levels or _WIDTHS),
    }


FAMILY = Family(
    name="sdxl",
    backbone_class="UNet2DConditionModel",
    requires={"addition_embed_type": "text_time"},
    component="unet",
    inputs=_inputs,
    output="out_sample",
    output_dims=lambda config: ("batch", config["out_channels"], "height", "width"),
    dims=_dims,
    sizes=latent_sizes,
    pixel_multiple=lambda config: VAE_SCALE * _downscale(config),
    native=_native,
    unquantized=r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding)",
    calibration={"guidance_scale": 5.0},
    output_class="diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput",
    # StableDiffusionXLPipeline compares the width of the pooled text with this layer's.
    attributes=lambda config: {
        "add_embedding.linear_1.in_features": config["projection_class_embeddings_input_dim"]
    },
    cache_plans=("deepcache", "tgate", "modelopt-sdxl"),
    optimum=Optimum("ORTStableDiffusionXLPipeline"),
    config_of=_config_of,
)
