"""AuraFlow: joint and single blocks over latent patches and text tokens."""

from __future__ import annotations

from diffc.models.family import Family
from diffc.models.spec import VAE_SCALE, Config, DimSpec, InputSpec, Shape, latent_sizes


def _inputs(config: Config) -> tuple[InputSpec, ...]:
    return (
        InputSpec("hidden_states", ("batch", config["in_channels"], "height", "width")),
        InputSpec("encoder_hidden_states", ("batch", "text", config["joint_attention_dim"])),
        InputSpec("timestep", ("batch",), "float32", "sigma"),
    )


def _dims(config: Config) -> tuple[DimSpec, ...]:
    # The learned positions are a square; an image takes a window of it.
    side = int(config["pos_embed_max_size"] ** 0.5) * config["patch_size"]
    patch = config["patch_size"]
    return DimSpec("batch"), DimSpec("height", patch, side), DimSpec("width", patch, side), DimSpec("text")


FAMILY = Family(
    name="auraflow",
    backbone_class="AuraFlowTransformer2DModel",
    component="transformer",
    inputs=_inputs,
    output="out_hidden_states",
    output_dims=lambda config: ("batch", config["out_channels"], "height", "width"),
    dims=_dims,
    sizes=latent_sizes,
    pixel_multiple=lambda config: VAE_SCALE * int(config["patch_size"]),
    native=lambda config: Shape(2, config["sample_size"] * VAE_SCALE, config["sample_size"] * VAE_SCALE, 256),
    unquantized=r".*(pos_embed|time_step_proj|context_embedder|norm_out|proj_out)",
    calibration={"guidance_scale": 3.5},
    output_class="diffusers.models.modeling_outputs:Transformer2DModelOutput",
)
