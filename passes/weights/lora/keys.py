"""The keys of adapter files: which layer a tensor belongs to, and what it is there."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"(?:\.\w+)?"
"""PEFT may put the adapter's name before `.weight`."""
_ROLES: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_NAME}\.weight|\.lora_A", "down"),
    (rf"\.lora_B{_NAME}\.weight|\.lora_B", "up"),
    (rf"\.lora_B{_NAME}\.bias|\.lora_up\.bias", "up_bias"),
    (r"(?:\.lora|\.lora_linear_layer)?(?:\.lora_down|\.down)\.weight", "down"),
    (r"(?:\.lora|\.lora_linear_layer)?(?:\.lora_up|\.up)\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (r"(?:\.lora|\.lora_linear_layer)?\.alpha", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "row_magnitude"),
    (r"\.hada_w1_a", "w1_a"),
    (r"\.hada_w1_b", "w1_b"),
    (r"\.hada_w2_a", "w2_a"),
    (r"\.hada_w2_b", "w2_b"),
    (r"\.hada_t1", "t1"),
    (r"\.hada_t2", "t2"),
    (r"\.lokr_w1", "kron_1"),
    (r"\.lokr_w1_a", "kron_1_a"),
    (r"\.lokr_w1_b", "kron_1_b"),
    (r"\.lokr_w2", "kron_2"),
    (r"\.lokr_w2_a", "kron_2_a"),
    (r"\.lokr_w2_b", "kron_2_b"),
    (r"\.lokr_t2", "kron_t2"),
    (r"\.diff|\.w_norm", "diff"),
    (r"\.diff_b|\.b_norm", "diff_b"),
    (r"\.diff_m", "diff_m"),
    (r"\.set_weight|\.weight|\.scale", "whole"),
    (r"\.bias", "whole_bias"),
)
_REFUSED: tuple[tuple[str, str], ...] = (
    (r"\.[ab][12]\.weight", "a GLoRA"),
    (r"\.oft_\w+(?:\.\w+)*", "an OFT"),
    (r"\.boft_\w+(?:\.\w+)*", "a BOFT"),
    (r"\.on_input|\.ia3_l(?:\.\w+)*", "an IA3"),
    (r"\.lora_E(?:\.\w+)*", "an AdaLoRA"),
    (r"\.vera_lambda_\w+(?:\.\w+)*", "a VeRA"),
    (r"\.reshape_weight", "a change of the layer's size"),
)
_SUFFIXES = [(re.compile(f"(?P<layer>.+?)(?:{pattern})"), role) for pattern, role in _ROLES]
_KINDS = [(re.compile(f".+?(?:{pattern})"), kind) for pattern, kind in _REFUSED]
_TEXT = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|lora_prior_te_|text_encoders?(?:_\d)?[._]|te[123]?[._]|lycoris_text_model"
    r"|text_model\.|cond_stage_model\.|conditioner\.|clip_[lgh]\.|t5xxl\.|bundle_emb\.|emb_params)"
)
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "model.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_",
)


@dataclass(frozen=True)
class Key:
    """A tensor's name taken apart: the `layer` as the file calls it, and what the tensor is there (`role`)."""

    layer: str
    role: str


def is_of_text_encoder(key: str) -> bool:
    """Whether a key belongs to a text encoder of the pipeline and not to its backbone."""
    return _TEXT.match(key) is not None


def refused_kind(key: str) -> str | None:
    """What kind of adapter a key is of, such as "a GLoRA", when nothing here can apply that kind; else None."""
    return next((kind for pattern, kind in _KINDS if pattern.fullmatch(key)), None)


def parse(key: str) -> Key | None:
    """Layer and role of a key; None when its end is not known."""
    for pattern, role in _SUFFIXES:
        if match := pattern.fullmatch(key):
            return Key(match["layer"], role)
    return None


def without_prefix(layer: str) -> list[str]:
    """The layer's name, and what is left of it when prefixes of trainers are taken away, one after another."""
    names = [layer]
    for name in names:
        names += [name.removeprefix(p) for p in _PREFIXES if name.startswith(p) and name != p]
    return list(dict.fromkeys(names))
