"""passes/weights/lora/unet_names.py: names of Stable Diffusion's release, against those of SDXL."""

from __future__ import annotations

from passes.weights.lora.unet_names import sgm_names

MODULES = [
    *(f"down_blocks.{i}.resnets.{j}.conv1" for i in range(3) for j in range(2)),
    *(f"down_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1.to_q" for i in (1, 2) for j in range(2)),
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.downsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
    "mid_block.attentions.0.proj_in",
    "mid_block.resnets.1.conv2",
    *(f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(3) for j in range(3)),
    *(f"up_blocks.{i}.attentions.{j}.proj_out" for i in (0, 1) for j in range(3)),
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.upsamplers.0.conv",
]


def test_sdxl() -> None:
    names = {ours: theirs for theirs, ours in sgm_names(MODULES)}
    assert names["down_blocks.0.resnets.1.conv1"] == "input_blocks.2.0.in_layers.2"
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.1.resnets.0.conv1"] == "input_blocks.4.0.in_layers.2"
    assert names["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == (
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    )
    assert names["down_blocks.2.resnets.1.conv1"] == "input_blocks.8.0.in_layers.2"
    assert names["mid_block.resnets.0.time_emb_proj"] == "middle_block.0.emb_layers.1"
    assert names["mid_block.attentions.0.proj_in"] == "middle_block.1.proj_in"
    assert names["mid_block.resnets.1.conv2"] == "middle_block.2.out_layers.3"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["up_blocks.1.resnets.2.conv_shortcut"] == "output_blocks.5.0.skip_connection"
    assert names["up_blocks.2.resnets.0.conv_shortcut"] == "output_blocks.6.0.skip_connection"


def test_a_level_without_attention_has_its_upsampler_in_place_one() -> None:
    modules = [*(f"up_blocks.0.resnets.{j}.conv1" for j in range(3)), "up_blocks.0.upsamplers.0.conv"]
    names = {ours: theirs for theirs, ours in sgm_names(modules)}
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"


def test_a_transformer_has_none() -> None:
    assert not list(sgm_names(["transformer_blocks.0.attn.to_q", "proj_out"]))
