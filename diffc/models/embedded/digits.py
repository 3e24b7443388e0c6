"""The trained embedded models: ten handwritten digits, painted by the architectures of SD1.5, SD3, FLUX, SDXL and LTX.

CLIP encoders, VAEs and backbones are small but trained (`tools/train/embedded.py`, docs/digits.md); what was trained
lies beside this file as 16-bit safetensors, the rest (T5 of SD3 and FLUX) is made from seeds. Images are 64 x 64 px;
`digits_video.py` has the model of videos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffc.models.embedded import digits_video, tiny
from diffc.models.embedded.tiny_text import CLIP_WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

DATA = Path(__file__).parent / "data" / "digits"
PIXELS = 64
WORDS = digits_video.WORDS

SD3: dict[str, Any] = tiny.SD3 | {"sample_size": 8, "pos_embed_max_size": 16}
FLUX: dict[str, Any] = tiny.FLUX | {"num_layers": 2, "num_single_layers": 2}
SDXL: dict[str, Any] = tiny.SDXL | {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "attention_head_dim": (1, 1, 1),  # diffusers' name for the number of heads
    "transformer_layers_per_block": (1, 1, 1),
    "norm_num_groups": 8,  # with one channel a group, a norm would take away what the time embedding adds
}
SD15: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64, 64),
    "attention_head_dim": 2,  # diffusers' name for the number of heads
    "layers_per_block": 1,
    "cross_attention_dim": CLIP_WIDTH,
    "norm_num_groups": 8,
}
BACKBONES = {
    "digits-sd3": "transformer",
    "digits-flux": "transformer",
    "digits-sdxl": "unet",
    "digits-sd15": "unet",
    "digits-video": "transformer",
}
"""The component that was trained for one model alone."""


def prompt(digit: int) -> str:
    """The prompt that asks for `digit` (0 to 9), as the quality figures use it."""
    return f"a handwritten {WORDS[digit]}"


def build(name: str) -> Any:
    """The trained pipeline of that name: backbone float16 (FLUX bfloat16), everything else float32.

    `name` is a key of `BACKBONES`. Leaves torch's global random state as it was. Raises FileNotFoundError where the
    package lacks its weights.
    """
    import torch

    pipeline = untrained(name)
    component = BACKBONES[name]
    for part, module in trained_parts(pipeline).items():
        load_weights(module, DATA / f"{part}.safetensors")
    backbone = getattr(pipeline, component)
    load_weights(backbone, DATA / f"{name}.safetensors")
    torch.nn.Module.to(backbone, torch.bfloat16 if name == "digits-flux" else torch.float16)
    return pipeline


def untrained(name: str) -> Any:
    """The pipeline of that name in float32, before any weights are loaded, from torch's random state."""
    import torch

    builders: dict[str, Callable[[], Any]] = {
        "digits-sd3": _sd3,
        "digits-flux": _flux,
        "digits-sdxl": _sdxl,
        "digits-sd15": _sd15,
        "digits-video": digits_video.untrained,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return builders[name]()


def trained_parts(pipeline: Any) -> dict[str, Any]:
    """The trained modules beside the backbone, by the name of their file: text encoders and a VAE."""
    if "T5" in type(pipeline.text_encoder).__name__:
        return {"t5_video": pipeline.text_encoder, "vae_video": pipeline.vae}
    parts = {"clip_l": pipeline.text_encoder}
    if "CLIP" in type(getattr(pipeline, "text_encoder_2", None)).__name__:
        parts["clip_g"] = pipeline.text_encoder_2
    return parts | {f"vae{pipeline.vae.config.latent_channels}": pipeline.vae}


def load_weights(module: Any, path: Path) -> None:
    """Fill every parameter of `module` from a safetensors file, cast to its own type; buffers stay.

    A file may hold more than the module has (CLIP's projection). Raises KeyError where it holds less.
    """
    import torch
    from safetensors.torch import load_file

    stored = load_file(path)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(stored[_stored_name(key)])


def save_weights(module: Any, path: Path, dtype: Any) -> None:
    """Write every parameter of `module` as `dtype`, in the form that `load_weights` reads."""
    from safetensors.torch import save_file

    tensors = {
        _stored_name(k): p.detach().to("cpu", dtype).contiguous() for k, p in module.named_parameters()
    }
    save_file(tensors, path)


def _stored_name(key: str) -> str:
    """CLIP with a projection keeps its text model one level deeper than CLIP without."""
    return key.removeprefix("text_model.")


def _sd3() -> Any:
    """StableDiffusion3Pipeline: two CLIP encoders side by side, padded to the width of T5."""
    import diffusers

    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(**SD3).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent_channels=16),
        text_encoder=clip_encoder("digits/clip_l", projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder("digits/clip_g", projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder("digits/t5"),
        tokenizer_3=t5_tokenizer(),
    )


def _flux() -> Any:
    """FluxPipeline: CLIP for the pooled vector, T5 for the text tokens, guidance as an input."""
    import diffusers

    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(**FLUX).eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(latent_channels=16),
        text_encoder=clip_encoder("digits/clip_l", projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder("digits/t5"),
        tokenizer_2=t5_tokenizer(),
    )


def _sdxl() -> Any:
    """StableDiffusionXLPipeline: two CLIP encoders, the pooled vector from the second."""
    import diffusers

    return diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**SDXL).eval(),
        scheduler=tiny.sdxl_scheduler(),
        vae=_vae(latent_channels=4),
        text_encoder=clip_encoder("digits/clip_l", projection=False),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder("digits/clip_g", projection=True),
        tokenizer_2=clip_tokenizer(),
        add_watermarker=False,
    )


def _sd15() -> Any:
    """StableDiffusionPipeline: one CLIP encoder, a UNet of four levels, SD1.5's schedule."""
    import diffusers

    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**SD15).eval(),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        vae=_vae(latent_channels=4),
        text_encoder=clip_encoder("digits/clip_l", projection=False),
        tokenizer=clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _vae(*, latent_channels: int) -> Any:
    """AutoencoderKL with scale factor 8; its scaling factor is 1 / std of the trained one's latents, rounded."""
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=latent_channels,
        scaling_factor={16: 2.0, 4: 1.5}[latent_channels],
        shift_factor=0.0,
        use_quant_conv=latent_channels == 4,
        use_post_quant_conv=latent_channels == 4,
        sample_size=PIXELS,
        force_upcast=False,
    ).eval()
