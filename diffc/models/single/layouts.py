"""The backbones that single files hold: what tells each, the converter of diffusers, and its config from shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffc.models.single import configs
from diffc.models.single.configs import Config, Shapes


@dataclass(frozen=True)
class Layout:
    """A kind of backbone in a single file.

    `title` is for people, `kind` the diffusers class, whose converter is used. A file is of it when it has all names
    of `original` (the release's own names, without prefix) or all of `diffusers`. `config` reads entries of config.json
    off the shapes by diffusers' names; the others are the defaults of the class. `unused`: names that the model has no
    use for.
    """

    title: str
    kind: str
    original: tuple[str, ...]
    diffusers: tuple[str, ...]
    config: Callable[[Shapes], Config]
    unused: tuple[str, ...] = ()

    def is_original(self, names: Collection[str]) -> bool:
        """Whether names are those of the original release."""
        return bool(self.original) and all(name in names for name in self.original)

    def is_diffusers(self, names: Collection[str]) -> bool:
        """Whether names are those of diffusers."""
        return bool(self.diffusers) and all(name in names for name in self.diffusers)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "FLUX.2",
        "Flux2Transformer2DModel",
        ("single_stream_modulation.lin.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("single_stream_modulation.linear.weight", "transformer_blocks.0.attn.norm_q.weight"),
        configs.flux2,
    ),
    Layout(
        "Chroma",
        "ChromaTransformer2DModel",
        ("distilled_guidance_layer.in_proj.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("distilled_guidance_layer.in_proj.weight", "transformer_blocks.0.attn.norm_q.weight"),
        configs.chroma,
    ),
    Layout(
        "Hunyuan Video",
        "HunyuanVideoTransformer3DModel",
        ("txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",),
        ("context_embedder.token_refiner.refiner_blocks.0.norm1.weight",),
        configs.counted(num_layers="transformer_blocks", num_single_layers="single_transformer_blocks"),
    ),
    Layout(
        "FLUX.1",
        "FluxTransformer2DModel",
        ("double_blocks.0.img_attn.norm.key_norm.scale", "vector_in.in_layer.weight"),
        ("single_transformer_blocks.0.proj_mlp.weight", "time_text_embed.text_embedder.linear_1.weight"),
        configs.flux,
    ),
    Layout(
        "Stable Diffusion 3",
        "SD3Transformer2DModel",
        ("joint_blocks.0.context_block.adaLN_modulation.1.weight", "pos_embed", "y_embedder.mlp.0.weight"),
        ("pos_embed.pos_embed", "transformer_blocks.0.norm1_context.linear.weight"),
        configs.sd3,
    ),
    Layout(
        "Qwen-Image",
        "QwenImageTransformer2DModel",
        (),
        ("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
        configs.qwen_image,
    ),
    Layout(
        "Z-Image",
        "ZImageTransformer2DModel",
        ("layers.0.adaLN_modulation.0.weight", "cap_embedder.1.weight", "x_embedder.weight"),
        ("layers.0.adaLN_modulation.0.weight", "all_x_embedder.2-1.weight"),
        configs.z_image,
        unused=("norm_final.weight",),
    ),
    Layout(
        "Lumina Image 2",
        "Lumina2Transformer2DModel",
        ("cap_embedder.0.weight", "layers.0.attention.qkv.weight"),
        ("time_caption_embed.caption_embedder.0.weight", "layers.0.attn.to_q.weight"),
        configs.lumina2,
        unused=("norm_final.weight",),
    ),
    Layout(
        "Wan",
        "WanTransformer3DModel",
        ("head.modulation", "patch_embedding.weight", "blocks.0.self_attn.q.weight"),
        ("condition_embedder.time_proj.weight", "patch_embedding.weight", "blocks.0.attn1.to_q.weight"),
        configs.wan,
    ),
    Layout(
        "LTX-Video",
        "LTXVideoTransformer3DModel",
        ("patchify_proj.weight", "adaln_single.linear.weight", "caption_projection.linear_1.weight"),
        ("proj_in.weight", "time_embed.linear.weight", "caption_projection.linear_1.weight"),
        configs.ltx,
    ),
    Layout(
        "AuraFlow",
        "AuraFlowTransformer2DModel",
        ("double_layers.0.attn.w2q.weight", "cond_seq_linear.weight"),
        ("joint_transformer_blocks.0.attn.to_q.weight", "register_tokens"),
        configs.counted(
            num_mmdit_layers="joint_transformer_blocks", num_single_dit_layers="single_transformer_blocks"
        ),
    ),
    Layout(
        "Mochi",
        "MochiTransformer3DModel",
        ("blocks.0.attn.qkv_x.weight",),
        ("time_embed.pooler.to_kv.weight", "transformer_blocks.0.attn1.to_q.weight"),
        configs.counted(num_layers="transformer_blocks"),
    ),
    Layout(
        "Sana",
        "SanaTransformer2DModel",
        ("blocks.0.cross_attn.q_linear.weight", "blocks.0.cross_attn.kv_linear.weight"),
        ("caption_norm.weight", "transformer_blocks.0.ff.conv_inverted.weight"),
        configs.counted(num_layers="transformer_blocks"),
    ),
    Layout(
        "Stable Diffusion",
        "UNet2DConditionModel",
        ("input_blocks.0.0.weight", "middle_block.1.proj_in.weight", "time_embed.0.weight", "out.2.weight"),
        ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.attentions.0.proj_in.weight"),
        configs.unet,
    ),
)
"""In the order in which they are asked: names of a later one may be in files of an earlier one."""


def layout_of(names: Collection[str]) -> Layout | None:
    """The layout whose names a file has; None for a file that is not known."""
    return next((item for item in LAYOUTS if item.is_original(names) or item.is_diffusers(names)), None)


def known_layouts() -> str:
    """Their titles, for messages."""
    return ", ".join(item.title for item in LAYOUTS)


def converter_of(layout: Layout) -> Callable[..., Mapping[str, Any]]:
    """diffusers' converter from the original names of a layout."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    found: Callable[..., Mapping[str, Any]] = SINGLE_FILE_LOADABLE_CLASSES[layout.kind][
        "checkpoint_mapping_fn"
    ]
    return found
