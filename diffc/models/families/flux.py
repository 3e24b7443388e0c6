"""FLUX.1: double-stream then single-stream blocks over packed latent tokens, rotary positions, guidance input."""

from __future__ import annotations

from typing import Any

from diffc.models.family import Family, Optimum
from diffc.models.spec import VAE_SCALE, Config, DimSpec, GraphFacts, InputSpec, Shape

_PATCH = VAE_SCALE * 2  # a token is a 2 x 2 patch of latents


def _inputs(config: Config) -> tuple[InputSpec, ...]:
    guidance = (InputSpec("guidance", ("batch",), "float32", "guidance"),)
    return (
        InputSpec("hidden_states", ("batch", "image", config["in_channels"])),
        InputSpec("encoder_hidden_states", ("batch", "text", config["joint_attention_dim"])),
        InputSpec("pooled_projections", ("batch", config["pooled_projection_dim"])),
        InputSpec("timestep", ("batch",), "float32", "sigma"),
        InputSpec("img_ids", ("image", 3), "float32", "image_ids"),
        InputSpec("txt_ids", ("text", 3), "float32", "text_ids"),
    ) + (guidance if config["guidance_embeds"] else ())


def _sizes(shape: Shape) -> dict[str, int]:
    image = (shape.height // _PATCH) * (shape.width // _PATCH)
    return {"batch": shape.batch, "image": image, "text": shape.text}


def _config_of(facts: GraphFacts) -> dict[str, Any]:
    channels = facts.size("hidden_states", 2)
    return {
        "in_channels": channels,
        "out_channels": facts.output_size(2, channels),
        "joint_attention_dim": facts.size("encoder_hidden_states", 2),
        "pooled_projection_dim": facts.size("pooled_projections", 1),
        "guidance_embeds": "guidance" in facts.inputs,
    }


FAMILY = Family(
    name="flux",
    backbone_class="FluxTransformer2DModel",
    component="transformer",
    inputs=_inputs,
    output="out_hidden_states",
    output_dims=lambda config: ("batch", "image", config.get("out_channels") or config["in_channels"]),
    dims=lambda _: (DimSpec("batch"), DimSpec("image"), DimSpec("text")),
    sizes=_sizes,
    pixel_multiple=lambda _: _PATCH,
    native=lambda _: Shape(1, 1024, 1024, 512),
    unquantized=r"(proj_out|.*(time_text_embed|context_embedder|x_embedder|norm_out))",
    calibration={"guidance_scale": 3.5},
    output_class="diffusers.models.modeling_outputs:Transformer2DModelOutput",
    cache_plans=("blocks",),
    # Positions are int64, as optimum exports them.
    optimum=Optimum("ORTFluxPipeline", {"img_ids": "int64", "txt_ids": "int64"}),
    config_of=_config_of,
)
