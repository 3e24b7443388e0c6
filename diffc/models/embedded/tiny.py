"""Builds the embedded models: complete diffusers pipelines, real head size 64, everything else small.

A backbone has every kind of layer of its release in its config's style, and three blocks of each kind, so
that there is a first, a middle and a last one.
"""

from __future__ import annotations

from typing import Any

from diffc.models.embedded.tiny_text import (
    CLIP_WIDTH,
    T5_WIDTH,
    clip_encoder,
    clip_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from diffc.models.embedded.tiny_weights import calm, seed_weights, sharpen_attention, smooth_in_time

HEAD = 64
SHARPNESS = 2.0  # see sharpen_attention
# See calm. What single roundings decide, as relative L2 of the output, stays below 2e-3 with these (INT8 and
# FP8, 60 inputs, float32 noise in every layer), and losing any one matrix moves the output by more than 3e-4.
TRANSFORMER_GAINS = {
    # The text stream reaches the output through attention only, so its own blocks may be lively.
    r".*\.(to_add_out|ff_context\.net\.2|norm1_context\.linear)": 0.5,
    # One vector for the whole image: what a rounding changes in it, it changes in every token.
    r".*blocks\..*\.norm\w*\.linear": 0.07,
    r".*\.(to_out\.0|ff\.net\.2|proj_out)": 0.2,
}
# A UNet has quantized convolutions on the stream itself, and a hundred times more values that can round either
# way: the finer the level, the calmer; what comes up from a coarser one is a branch too.
UNET_GAINS = {
    r"(down_blocks\.0|up_blocks\.2)\..*\.(conv2|proj_out)": 0.015,
    r"(down_blocks\.1|up_blocks\.1)\..*\.(conv2|proj_out)": 0.08,
    r".*\.(conv2|proj_out)": 0.4,
    r".*\.(to_out\.0|ff\.net\.2)": 0.5,
    r".*\.upsamplers\.0\.conv": 0.1,
}

SD3: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": HEAD,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "caption_projection_dim": 2 * HEAD,
    "pooled_projection_dim": 2 * CLIP_WIDTH,
    "pos_embed_max_size": 64,
}
SD35 = SD3 | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 3,
    "num_single_layers": 3,
    "attention_head_dim": HEAD,
    "num_attention_heads": 2,
    "joint_attention_dim": T5_WIDTH,
    "pooled_projection_dim": CLIP_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}
TIME_ID_WIDTH = 32
SDXL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128, 128),
    "attention_head_dim": (1, 2, 2),  # diffusers' name for the number of heads
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 2 * CLIP_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": CLIP_WIDTH + 6 * TIME_ID_WIDTH,
}


def build(name: str) -> Any:
    """The pipeline of that name: backbone float16 (FLUX bfloat16), everything else float32, weights seeded.

    Leaves torch's global random state as it was. `name` is a key of `diffc.models.embedded.catalogue.EMBEDDED`.
    """
    import torch

    builders = {
        "tiny-sd3": lambda: _sd3("tiny-sd3", SD3),
        "tiny-sd35": lambda: _sd3("tiny-sd35", SD35),
        "tiny-flux": lambda: _flux("tiny-flux"),
        "tiny-sdxl": lambda: _sdxl("tiny-sdxl"),
    }
    with torch.random.fork_rng(devices=[]):  # the constructors below draw weights that seed_weights replaces
        return builders[name]()


def _sd3(name: str, config: dict[str, Any]) -> Any:
    """StableDiffusion3Pipeline: two CLIP encoders side by side, padded to the width of T5."""
    import diffusers
    import torch

    transformer = diffusers.SD3Transformer2DModel(**config)
    return diffusers.StableDiffusion3Pipeline(
        transformer=_backbone(transformer, f"{name}/transformer", torch.float16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(name, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip_encoder(f"{name}/text_encoder", projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(f"{name}/text_encoder_2", projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(f"{name}/text_encoder_3"),
        tokenizer_3=t5_tokenizer(),
    )


def _flux(name: str) -> Any:
    """FluxPipeline: CLIP for the pooled vector, T5 for the text tokens, the schedule of FLUX.1-dev."""
    import diffusers
    import torch

    transformer = diffusers.FluxTransformer2DModel(**FLUX)
    return diffusers.FluxPipeline(
        transformer=_backbone(transformer, f"{name}/transformer", torch.bfloat16),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(name, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip_encoder(f"{name}/text_encoder", projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(f"{name}/text_encoder_2"),
        tokenizer_2=t5_tokenizer(),
    )


def sdxl_scheduler() -> Any:
    """The scheduler of SDXL's release."""
    import diffusers

    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def _sdxl(name: str) -> Any:
    """StableDiffusionXLPipeline: two CLIP encoders, the pooled vector from the second."""
    import diffusers
    import torch

    unet = diffusers.UNet2DConditionModel(**SDXL)
    return diffusers.StableDiffusionXLPipeline(
        unet=_backbone(unet, f"{name}/unet", torch.float16),
        scheduler=sdxl_scheduler(),
        vae=_vae(name, latent_channels=4, scaling_factor=0.13025),
        text_encoder=clip_encoder(f"{name}/text_encoder", projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(f"{name}/text_encoder_2", projection=True),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def _vae(name: str, *, latent_channels: int, scaling_factor: float, shift_factor: float | None = None) -> Any:
    """AutoencoderKL with scale factor 8; with a shift factor no quant convolutions, as released."""
    import diffusers

    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=latent_channels,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
        sample_size=128,
        force_upcast=False,
    )
    seed_weights(vae, f"{name}/vae")
    return vae.eval()


def _backbone(model: Any, seed: str, dtype: Any) -> Any:
    """`model` with seeded weights of type `dtype`, calm and smooth in time, in evaluation mode."""
    import torch
    from diffusers.models.embeddings import TimestepEmbedding

    seed_weights(model, seed)
    sharpen_attention(model, SHARPNESS)
    calm(model, UNET_GAINS if seed.endswith("/unet") else TRANSFORMER_GAINS)
    for name, part in model.named_modules():
        if isinstance(part, TimestepEmbedding) and name != "add_embedding":  # that one takes text and sizes
            smooth_in_time(part.linear_1.weight)
    # Not model.to(): diffusers warns there of modules to keep in float32, of which these have none.
    return torch.nn.Module.to(model, dtype).eval()
