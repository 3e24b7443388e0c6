"""passes/weights/lora/keys.py: keys taken apart."""

from __future__ import annotations

import pytest

from passes.weights.lora.keys import Key, is_of_text_encoder, parse, refused_kind, without_prefix


@pytest.mark.parametrize(
    ("key", "layer", "role"),
    [
        ("lora_unet_down_blocks_0_attn.lora_down.weight", "lora_unet_down_blocks_0_attn", "down"),
        ("transformer.a.to_q.lora_A.weight", "transformer.a.to_q", "down"),
        ("a.to_q.lora_B.default.weight", "a.to_q", "up"),
        ("a.to_q.lora_B", "a.to_q", "up"),
        ("a.to_q.lora_B.bias", "a.to_q", "up_bias"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q", "down"),
        ("a.attn1.processor.to_q_lora.up.weight", "a.attn1.processor.to_q_lora", "up"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1", "down"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha"),
        ("a.dora_scale", "a", "magnitude"),
        ("a.lora_magnitude_vector.default.weight", "a", "row_magnitude"),
        ("a.hada_w2_b", "a", "w2_b"),
        ("a.lokr_w1_a", "a", "kron_1_a"),
        ("a.diff_b", "a", "diff_b"),
        ("a.img_attn.norm.query_norm.scale", "a.img_attn.norm.query_norm", "whole"),
    ],
)
def test_layer_and_role(key: str, layer: str, role: str) -> None:
    assert parse(key) == Key(layer, role)


def test_an_unknown_end_is_none() -> None:
    assert parse("a.to_q.mystery") is None


@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_x.alpha", "lora_te_x.alpha", "text_encoder_2.a.lora_A.weight",
            "text_encoders.clip_l.transformer.a.lora_A.weight", "lora_te3_a.alpha"]
)  # fmt: skip
def test_text_encoders(key: str) -> None:
    assert is_of_text_encoder(key)


@pytest.mark.parametrize(
    "key", ["lora_unet_te_x.alpha", "transformer.context_embedder.lora_A.weight", "text_embedding.0.diff"]
)
def test_backbones_are_no_text_encoders(key: str) -> None:
    assert not is_of_text_encoder(key)


def test_kinds_that_are_refused_have_names() -> None:
    assert refused_kind("a.oft_blocks") == "an OFT"
    assert refused_kind("a.b1.weight") == "a GLoRA"
    assert refused_kind("a.lora_A.weight") is None


def test_prefixes_are_taken_away_one_after_another() -> None:
    names = without_prefix("base_model.model.transformer.a")
    assert (
        names == ["base_model.model.transformer.a", "transformer.a", "model.transformer.a", "a"]
        or "a" in names
    )
    assert without_prefix("transformer_blocks.0") == ["transformer_blocks.0"]
