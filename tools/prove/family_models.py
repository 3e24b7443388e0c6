"""Tiny pipelines of diffusers' classes: seeded weights, real head sizes, everything else small; complete on disk.

python -m tools.prove.family_models sd15 /tmp/models
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffc.models.capture.stand_ins import tokenizer
from diffc.models.embedded.tiny_text import T5_WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from diffc.models.embedded.tiny_weights import seed_weights, smooth_in_time
from tools.prove.tiny_pipeline import HEADS, IMAGE_VAE, UNET, WAN_VAE, Tiny
from tools.prove.unseen_models import UNSEEN

MODELS: dict[str, Tiny] = {
    "sd15": Tiny(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        UNET | {"attention_head_dim": 2},
        ("clip",),
        scheduler="DDIMScheduler",
        component="unet",
        more={"requires_safety_checker": False},
    ),
    "sd21": Tiny(
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        UNET | {"attention_head_dim": (1, 2), "use_linear_projection": True},
        ("clip",),
        scheduler="DDIMScheduler",
        scheduler_config={"prediction_type": "v_prediction"},
        component="unet",
        more={"requires_safety_checker": False},
    ),
    "pixart-sigma": Tiny(
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 72,
            "num_layers": 4,
            "cross_attention_dim": 144,
            "caption_channels": T5_WIDTH,
            "sample_size": 16,
            "interpolation_scale": 1,
            "use_additional_conditions": False,
        },
        ("t5",),
        scheduler="DPMSolverMultistepScheduler",
    ),
    "sana": Tiny(
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "num_layers": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 64,
            "cross_attention_dim": 128,
            "caption_channels": T5_WIDTH,
            "sample_size": 8,
        },
        ("llm",),
        vae="AutoencoderDC",
        vae_config={
            "latent_channels": 32,
            "encoder_block_out_channels": (8, 8, 8, 8, 8, 32),
            "decoder_block_out_channels": (8, 8, 8, 8, 8, 32),
            "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "scaling_factor": 0.41407,
        },
    ),
    "auraflow": Tiny(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        HEADS
        | {
            "sample_size": 32,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 4,
            "joint_attention_dim": T5_WIDTH,
            "caption_projection_dim": 256,
            "pos_embed_max_size": 4096,
        },
        ("t5",),
    ),
    "ltx": Tiny(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "cross_attention_dim": 128,
            "num_layers": 4,
            "caption_channels": T5_WIDTH,
        },
        ("t5",),
        vae="AutoencoderKLLTXVideo",
        vae_config={
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
        },
    ),
    "wan14b": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        HEADS | {"text_dim": T5_WIDTH, "ffn_dim": 512, "num_layers": 4},
        ("t5",),
        vae="AutoencoderKLWan",
        vae_config=WAN_VAE,
    ),
    "wan22-14b": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        HEADS | {"text_dim": T5_WIDTH, "ffn_dim": 512, "num_layers": 4},
        ("t5",),
        vae="AutoencoderKLWan",
        vae_config=WAN_VAE,
        more={"boundary_ratio": 0.875},
        experts=("transformer_2",),
    ),
    "wan5b": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        HEADS
        | {"text_dim": T5_WIDTH, "ffn_dim": 512, "num_layers": 4, "in_channels": 48, "out_channels": 48},
        ("t5",),
        vae="AutoencoderKLWan",
        vae_config=WAN_VAE
        | {
            "z_dim": 48,
            "latents_mean": (0.0,) * 48,
            "latents_std": (1.0,) * 48,
            "scale_factor_spatial": 16,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
        },
        more={"expand_timesteps": True},
    ),
    "cogvideox": Tiny(
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "text_embed_dim": T5_WIDTH,
            "num_layers": 4,
            "time_embed_dim": 32,
            "use_rotary_positional_embeddings": True,
            "max_text_seq_length": 64,
        },
        ("t5",),
        vae="AutoencoderKLCogVideoX",
        vae_config={"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
        scheduler="CogVideoXDDIMScheduler",
    ),
    "flux2": Tiny(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        HEADS | {"num_layers": 1, "num_single_layers": 4, "joint_attention_dim": 3 * T5_WIDTH},
        ("llm40",),
        vae="AutoencoderKLFlux2",
        vae_config=IMAGE_VAE | {"latent_channels": 32},
    ),
    "cogview4": Tiny(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        HEADS
        | {
            "num_layers": 4,
            "text_embed_dim": T5_WIDTH,
            "time_embed_dim": 32,
            "condition_dim": 16,
            "rope_axes_dim": (64, 64),
        },
        ("llm",),
        vae_config={"latent_channels": 16},
    ),
    "hunyuanvideo": Tiny(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        HEADS
        | {
            "num_layers": 1,
            "num_single_layers": 4,
            "num_refiner_layers": 1,
            "text_embed_dim": T5_WIDTH,
            "pooled_projection_dim": 64,
        },
        ("llm", "clip"),
        vae="AutoencoderKLHunyuanVideo",
        vae_config={"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
    ),
    "chroma": Tiny(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        HEADS
        | {
            "num_layers": 1,
            "num_single_layers": 4,
            "joint_attention_dim": T5_WIDTH,
            "approximator_num_channels": 64,
            "approximator_hidden_dim": 128,
            "approximator_layers": 2,
        },
        ("t5",),
        vae_config={"latent_channels": 16, "shift_factor": 0.1},
    ),
    "qwenimage": Tiny(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        HEADS | {"num_layers": 4, "joint_attention_dim": T5_WIDTH},
        ("llm",),
        vae="AutoencoderKLQwenImage",
        vae_config=WAN_VAE,
    ),
    "mochi": Tiny(
        "MochiPipeline",
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "num_layers": 4,
            "pooled_projection_dim": 64,
            "text_embed_dim": T5_WIDTH,
            "time_embed_dim": 32,
        },
        ("t5",),
        vae="AutoencoderKLMochi",
        vae_config={
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": (1, 1, 1, 1, 1),
            "latents_mean": (0.0,) * 12,
            "latents_std": (1.0,) * 12,
        },
        more={"force_zeros_for_empty_prompt": False},
    ),
    "lumina2": Tiny(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "hidden_size": 192,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "num_layers": 4,
            "num_refiner_layers": 1,
            "cap_feat_dim": T5_WIDTH,
            "axes_dim_rope": (32, 32, 32),
            "axes_lens": (300, 64, 64),
            "multiple_of": 64,
        },
        ("llm",),
        vae_config={"latent_channels": 16, "shift_factor": 0.1},
    ),
    "z-image": Tiny(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "dim": 256,
            "n_layers": 4,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": T5_WIDTH,
            "axes_dims": (32, 48, 48),
        },
        ("llm",),
        vae_config={"latent_channels": 16, "shift_factor": 0.1},
    ),
    **UNSEEN,
}


def make(name: str, folder: Path, **changed: Any) -> Path:
    """The pipeline `name` of MODELS as a folder in `folder`, which is its path. One that is there is left alone.

    `changed` are entries of the backbone's configuration.
    """
    import diffusers
    import torch
    from diffusers.models.embeddings import TimestepEmbedding

    model, place = MODELS[name], folder / name
    if (place / "model_index.json").is_file():
        return place
    with torch.random.fork_rng(devices=[]):
        parts = dict[str, Any]()
        for component in (model.component, *model.experts):
            backbone = getattr(diffusers, model.backbone)(**{**model.config, **changed})
            seed_weights(backbone, f"{name}/{component}")
            for part in backbone.modules():
                if isinstance(
                    part, TimestepEmbedding
                ):  # as trained models are: a rounded time changes little
                    smooth_in_time(part.linear_1.weight)
            parts[component] = backbone
        vae_config = dict(model.vae_config)
        if model.vae == "AutoencoderKL":
            vae_config = IMAGE_VAE | vae_config
        vae = getattr(diffusers, model.vae)(**vae_config)
        seed_weights(vae, f"{name}/vae")
        parts["vae"] = vae
        parts["scheduler"] = getattr(diffusers, model.scheduler)(**model.scheduler_config)
        for number, kind in enumerate(model.text):
            tail = f"_{number + 1}" if number else ""
            parts[f"text_encoder{tail}"], parts[f"tokenizer{tail}"] = _text(
                kind, f"{name}/text{tail}", model.vocabulary
            )
        for part, kind in model.others.items():
            if kind:
                parts[part] = tokenizer(512) if kind == "tokenizer" else getattr(diffusers, kind)()
    _save(place, model, parts)
    return place


def _text(kind: str, seed: str, vocabulary: int) -> tuple[Any, Any]:
    if kind == "clip":
        return clip_encoder(seed, projection=False), clip_tokenizer()
    if kind == "t5":
        return t5_encoder(seed), t5_tokenizer()
    if kind == "qwen3vl":
        return _qwen3vl(seed), tokenizer(512)
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=T5_WIDTH,
        intermediate_size=2 * T5_WIDTH,
        num_hidden_layers=int(kind.removeprefix("llm") or 2),
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    encoder = LlamaModel(config)
    seed_weights(encoder, seed)
    return encoder.eval(), tokenizer(512)


def _qwen3vl(seed: str) -> Any:
    """A text encoder that takes positions of three axes."""
    from transformers import Qwen3VLConfig, Qwen3VLModel

    text = {
        "vocab_size": 128,
        "hidden_size": T5_WIDTH,
        "intermediate_size": 2 * T5_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10]},
        "pad_token_id": 0,
    }
    sight = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": T5_WIDTH,
    }
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight))
    seed_weights(encoder, seed)
    return encoder.eval()


def _save(place: Path, model: Tiny, parts: Mapping[str, Any]) -> None:
    """Write every component as diffusers would, and model_index.json."""
    import json

    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": "0.42.0", **model.more}
    for name, part in parts.items():
        part.save_pretrained(place / name)
        library = type(part).__module__.partition(".")[0]
        index[name] = [library, type(part).__name__]
    absent = [name for name, kind in model.others.items() if not kind]
    for name in (*absent, *(("safety_checker", "feature_extractor") if model.component == "unet" else ())):
        index[name] = [None, None]
    (place / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    for wanted in sys.argv[1].split(","):
        print(make(wanted, Path(sys.argv[2])))
