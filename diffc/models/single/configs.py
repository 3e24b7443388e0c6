"""config.json of a backbone, read off the shapes of its weights by diffusers' names.

What no shape tells (sizes that a model was trained for, angles of positions) is as in the releases: the defaults of
the diffusers class, or the value here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]


def count(shapes: Shapes, name: str) -> int:
    """How many modules `name`.0, `name`.1 ... there are; `name` may be a regular expression."""
    found = {int(m[1]) for key in shapes if (m := re.match(rf"{name}\.(\d+)\.", key))}
    return max(found, default=-1) + 1


def _stream(shapes: Shapes) -> Config:
    """What FLUX.1, Chroma, FLUX.2 and Qwen-Image have in common: blocks of several heads with a norm of each."""
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    width = shapes["transformer_blocks.0.attn.to_q.weight"][0]
    return {
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
    }


def flux(shapes: Shapes) -> Config:
    """FLUX.1 dev, schnell, depth, canny, fill, and smaller ones of its kind."""
    config = _stream(shapes)
    head, channels = config["attention_head_dim"], shapes["x_embedder.weight"][1]
    made = shapes["proj_out.weight"][0]
    return config | {
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "in_channels": channels,
        "out_channels": None if made == channels else made,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": [16, (head - 16) // 2, (head - 16) // 2],
    }


def chroma(shapes: Shapes) -> Config:
    """Chroma: FLUX.1 with one approximator for all modulations."""
    config = _stream(shapes)
    head = config["attention_head_dim"]
    return config | {
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "in_channels": shapes["x_embedder.weight"][1],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "axes_dims_rope": [16, (head - 16) // 2, (head - 16) // 2],
        "approximator_hidden_dim": shapes["distilled_guidance_layer.in_proj.weight"][0],
        "approximator_num_channels": shapes["distilled_guidance_layer.in_proj.weight"][1],
        "approximator_layers": count(shapes, r"distilled_guidance_layer\.layers"),
    }


def flux2(shapes: Shapes) -> Config:
    """FLUX.2 dev and klein."""
    config = _stream(shapes)
    width = config["attention_head_dim"] * config["num_attention_heads"]
    return config | {
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "in_channels": shapes["x_embedder.weight"][1],
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / width,
        "axes_dims_rope": [config["attention_head_dim"] // 4] * 4,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def qwen_image(shapes: Shapes) -> Config:
    """Qwen-Image and Qwen-Image-Edit."""
    config = _stream(shapes)
    head = config["attention_head_dim"]
    return config | {
        "axes_dims_rope": [16, (head - 16) // 2, (head - 16) // 2],
        "in_channels": shapes["img_in.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "joint_attention_dim": shapes["txt_in.weight"][1],
    }


def sd3(shapes: Shapes) -> Config:
    """Stable Diffusion 3 and 3.5."""
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    layers = count(shapes, "transformer_blocks")
    positions = isqrt(shapes["pos_embed.pos_embed"][1])
    return {
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": positions,
        "sample_size": min(128, positions * patch),
        "dual_attention_layers": [
            i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes
        ],
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def wan(shapes: Shapes) -> Config:
    """Wan 2.1 and 2.2, from text or from an image."""
    width, channels = shapes["patch_embedding.weight"][:2]
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    return {
        "num_layers": count(shapes, "blocks"),
        "num_attention_heads": width // 128,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "image_dim": None if image is None else image[0],
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj.weight" in shapes else None,
    }


def ltx(shapes: Shapes) -> Config:
    """LTX-Video."""
    width, channels = shapes["proj_in.weight"]
    return {
        "num_layers": count(shapes, "transformer_blocks"),
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def z_image(shapes: Shapes) -> Config:
    """Z-Image."""
    head = shapes["layers.0.attention.norm_q.weight"][0]
    rows, width = shapes["layers.0.attention.to_q.weight"]
    return {
        "dim": width,
        "n_layers": count(shapes, "layers"),
        "n_refiner_layers": count(shapes, "noise_refiner"),
        "n_heads": rows // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "in_channels": shapes["all_x_embedder.2-1.weight"][1] // 4,
        "cap_feat_dim": shapes["cap_embedder.1.weight"][1],
        "axes_dims": [head // 4, head * 3 // 8, head * 3 // 8],
    }


def lumina2(shapes: Shapes) -> Config:
    """Lumina Image 2."""
    width = shapes["layers.0.attn.to_q.weight"][0]
    head = shapes["layers.0.attn.norm_q.weight"][0]
    return {
        "hidden_size": width,
        "num_layers": count(shapes, "layers"),
        "num_refiner_layers": count(shapes, "noise_refiner"),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
    }


def counted(**names: str) -> Callable[[Shapes], Config]:
    """A release whose widths are the defaults of its class: entries of the config that count modules."""
    return lambda shapes: {entry: count(shapes, name) for entry, name in names.items()}


def unet(shapes: Shapes) -> Config:
    """The UNets of Stable Diffusion 1, 2 and XL."""
    levels = count(shapes, "down_blocks")
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    first = r"down_blocks\.{}\.attentions\.0\.transformer_blocks"
    depths = [count(shapes, first.format(i)) for i in range(levels)]
    proj = next(key for key in shapes if key.endswith("attentions.0.proj_in.weight"))
    linear = len(shapes[proj]) == 2
    joined = next(key for key in shapes if key.endswith("transformer_blocks.0.attn2.to_k.weight"))
    config: Config = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": count(shapes, r"down_blocks\.0\.resnets"),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": shapes[joined][1],
        "use_linear_projection": linear,
        "attention_head_dim": [width // 64 for width in widths] if linear else 8,
        "sample_size": 64,
    }
    middle = count(shapes, r"mid_block\.attentions\.0\.transformer_blocks")
    if middle != 1 or any(depth > 1 for depth in depths):
        config["transformer_layers_per_block"] = [depth or middle for depth in depths]
    added = shapes.get("add_embedding.linear_1.weight")
    if added is None:
        return config | ({"sample_size": 96} if linear else {})
    return config | _sdxl(added[1], depths)


def _sdxl(width: int, depths: list[int]) -> Config:
    """Sizes and pooled text in the time embedding: six sinusoids of one size, the largest that leaves room for text."""
    time = max(size for size in (256, 128, 64, 32, 16, 8) if 6 * size < width or size == 8)
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time,
        "projection_class_embeddings_input_dim": width,
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "sample_size": 128,
    }
