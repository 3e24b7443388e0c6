"""Stable Diffusion 3 and 3.5: joint (MMDiT) blocks over latent patches and text tokens."""

from __future__ import annotations

from math import isqrt, prod
from typing import Any

from diffc.models.family import Family, Optimum
from diffc.models.spec import VAE_SCALE, Config, DimSpec, GraphFacts, InputSpec, Shape, latent_sizes


def _inputs(config: Config) -> tuple[InputSpec, ...]:
    return (
        InputSpec("hidden_states", ("batch", config["in_channels"], "height", "width")),
        InputSpec("encoder_hidden_states", ("batch", "text", config["joint_attention_dim"])),
        InputSpec("pooled_projections", ("batch", config["pooled_projection_dim"])),
        InputSpec("timestep", ("batch",), "float32", "timestep"),
    )


def _dims(config: Config) -> tuple[DimSpec, ...]:
    patch = config["patch_size"]
    # The learned grid of positions is cropped to the image: a larger image has no positions.
    largest = config["pos_embed_max_size"] * patch
    return (
        DimSpec("batch"),
        DimSpec("height", patch, largest),
        DimSpec("width", patch, largest),
        DimSpec("text"),
    )


def _native(config: Config) -> Shape:
    pixels = config["sample_size"] * VAE_SCALE
    return Shape(2, pixels, pixels, 333)  # 77 CLIP tokens and 256 of T5; two for classifier-free guidance


def _config_of(facts: GraphFacts) -> dict[str, Any]:
    channels = facts.size("hidden_states", 1)
    # [1, positions, width], or [1, rows, columns, width] where a trace has reshaped it; without a table, that of
    # SD3.5-medium, the largest that was released.
    table = facts.weights.get("pos_embed.pos_embed", (1, 384, 384, 0))
    return {
        "sample_size": 128,
        "patch_size": facts.weight("pos_embed.proj.weight", 2, 2),
        "in_channels": channels,
        "out_channels": facts.output_size(1, channels),
        "joint_attention_dim": facts.size("encoder_hidden_states", 2),
        "pooled_projection_dim": facts.size("pooled_projections", 1),
        "pos_embed_max_size": isqrt(prod(table[1:-1])),
    }


FAMILY = Family(
    name="sd3",
    backbone_class="SD3Transformer2DModel",
    component="transformer",
    inputs=_inputs,
    output="out_hidden_states",
    output_dims=lambda config: ("batch", config["out_channels"], "height", "width"),
    dims=_dims,
    sizes=latent_sizes,
    pixel_multiple=lambda config: VAE_SCALE * int(config["patch_size"]),
    native=_native,
    unquantized=r".*(pos_embed|time_text_embed|context_embedder|norm_out|x_embedder)",
    calibration={"guidance_scale": 7.0},
    output_class="diffusers.models.modeling_outputs:Transformer2DModelOutput",
    cache_plans=("blocks", "modelopt-sd3"),
    optimum=Optimum("ORTStableDiffusion3Pipeline"),
    config_of=_config_of,
)
