"""passes/weights/lora/rules.py: each table against diffusers' own converter of the release that it is about.

A model's weights are put under their release's names by our table and come back, by diffusers' converter, as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import diffusers.loaders.single_file_utils as converters
import pytest
import torch
from torch import Tensor

from passes.weights.lora.rules import OVERRIDES, SPELLINGS, TABLES
from passes.weights.lora.spellings import Layer, Piece, rule_layers, spellings_of
from passes.weights.lora.unet_names import sgm_names

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4}
SD3 = {
    **SMALL, "sample_size": 16, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
    "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
WAN = {
    **SMALL,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "image_dim": 16,
    "added_kv_proj_dim": 16,
}
Z_IMAGE = {
    "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 16, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8],
}  # fmt: skip
FLUX_2 = {
    **SMALL, "num_single_layers": 2, "joint_attention_dim": 16, "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}  # fmt: skip
UNET = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 8, "use_linear_projection": True,
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], Callable[..., Any], dict[str, str]]] = {
    "sd3": (
        "SD3Transformer2DModel", SD3, ("sd3", "flux"), converters.convert_sd3_transformer_checkpoint_to_diffusers,
        {"pos_embed.pos_embed": "pos_embed"},
    ),
    "wan": ("WanTransformer3DModel", WAN, ("wan",), converters.convert_wan_transformer_to_diffusers, {}),
    "z-image": (
        "ZImageTransformer2DModel", Z_IMAGE, ("z-image",),
        converters.convert_z_image_transformer_checkpoint_to_diffusers, {},
    ),
    "flux2": (
        "Flux2Transformer2DModel", FLUX_2, ("flux2", "flux"),
        converters.convert_flux2_transformer_checkpoint_to_diffusers, {},
    ),
    "unet": ("UNet2DConditionModel", UNET, ("unet",), converters.convert_ldm_unet_checkpoint, {}),
}  # fmt: skip


def layers_of(shapes: dict[str, tuple[int, ...]], tables: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    if "wan" in tables:
        yield from rule_layers(OVERRIDES, shapes)
    for table in tables:
        yield from rule_layers(TABLES[table], shapes)
    if "unet" in tables:
        yield from (
            (theirs, (Piece(ours),))
            for theirs, ours in sgm_names(dict.fromkeys(n.rpartition(".")[0] for n in shapes))
        )


def released(state: dict[str, Tensor], tables: tuple[str, ...]) -> dict[str, Tensor]:
    """`state` under the names of the release; what no line tells keeps its name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    result, done = {}, set[str]()
    for theirs, layer in layers_of(shapes, tables):
        modules = [piece.module for piece in layer]
        for leaf in ("weight", "bias") if done.isdisjoint(modules) else ():
            parts = [state[f"{module}.{leaf}"] for module in modules if f"{module}.{leaf}" in state]
            if layer[0].swapped and parts:
                half = len(parts[0]) // 2
                parts = [parts[0][half:], parts[0][:half]]
            if parts:
                flux_norm = theirs.endswith(("query_norm", "key_norm"))
                result[f"{theirs}.{'scale' if flux_norm else leaf}"] = torch.cat(parts)
        done |= set(modules)
    return result | {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in done}


@pytest.mark.parametrize("case", CASES)
def test_the_converter_of_diffusers_undoes_our_table(case: str) -> None:
    name, config, tables, convert, renamed = CASES[case]
    model = getattr(diffusers, name)(**config)
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}
    theirs = {renamed.get(key, key): value for key, value in released(state, tables).items()}
    if case == "unet":
        theirs = {f"model.diffusion_model.{key}": value for key, value in theirs.items()}
        found = convert(theirs, dict(model.config))
    else:
        found = convert(theirs)
    wrong = [
        k for k, v in state.items() if k not in found or found[k] is None or not torch.equal(found[k], v)
    ]
    assert not wrong


def test_ltx_words() -> None:
    shapes = {
        f"{name}.weight": (4, 4)
        for name in ("proj_in", "time_embed.linear", "transformer_blocks.0.attn1.norm_q")
    }
    found = spellings_of(shapes)
    for theirs, ours in (
        ("patchify_proj", "proj_in"),
        ("adaln_single.linear", "time_embed.linear"),
        ("transformer_blocks.0.attn1.q_norm", "transformer_blocks.0.attn1.norm_q"),
    ):
        assert found.find(theirs) == (Piece(ours),)
    assert len(SPELLINGS) == 3
