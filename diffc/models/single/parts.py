"""What a file holds beside the backbone: text encoders, a VAE, averages of training; told by the names of tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from diffc.errors import DiffcError, UnsupportedError
from passes.weights.recipe import Recipe

BACKBONE = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "unet.")
"""Prefixes of a backbone in a file that has more than that, or comes from a wrapper."""
_PARTS: Mapping[str, str] = {
    "VAE": r"(first_stage_model|vae|audio_vae|vocoder)\.",
    "text encoder": r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders?(_\d)?\.|text_embedding_projection)",
    "moving average": r"model_ema\.",
    "schedule": r"(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar"
    r"|denoiser\.sigmas|model_sampling\..*|edm_mean|edm_std|v_pred|ztsnr|global_step|epoch|.*\.num_batches_tracked)$",
}
_OTHERS: tuple[tuple[str, str, str], ...] = (
    (
        r"lora_(up|down|A|B)|\.lora\.|hada_w|lokr_w|\.diff(_b)?$|dora_scale",
        "a LoRA",
        "give the model, and this file with --lora",
    ),
    (r"^(control_model\.|controlnet_|input_hint_block)", "a ControlNet", "give the model that it controls"),
    (r"^(emb_params|string_to_param|clip_[gl]$)", "an embedding of prompts", "give the model that it is for"),
    (r"^ip_adapter\.|^image_proj\.", "an IP-Adapter", "give the model that it is for"),
    (r"^(encoder|decoder)\.(down|up|mid|conv_in)", "a VAE alone", "give the backbone"),
    (
        r"^(text_model|transformer\.resblocks|shared\.weight|encoder\.block)",
        "a text encoder alone",
        "give the backbone",
    ),
)


@dataclass(frozen=True)
class Parts:
    """The backbone's tensors without their prefix, the prefix, the other parts by name, and `beside`, their tensors."""

    backbone: Mapping[str, Recipe]
    prefix: str
    others: tuple[str, ...]
    beside: Mapping[str, Recipe]


def split_parts(tensors: Mapping[str, Recipe], where: object) -> Parts:
    """The parts of a file. Raises DiffcError for a tensor of no known part."""
    prefix = next((p for p in BACKBONE if sum(name.startswith(p) for name in tensors) > 3), "")
    own = {name.removeprefix(prefix): recipe for name, recipe in tensors.items() if name.startswith(prefix)}
    rest = [name for name in tensors if not name.startswith(prefix)]
    if not prefix:
        rest = [name for name in tensors if any(re.match(p, name) for p in _PARTS.values())]
        own = {name: recipe for name, recipe in tensors.items() if name not in set(rest)}
    for name in [n for n in rest if n.rpartition(".")[2] == "scaled_fp8"]:  # of the whole file
        own["scaled_fp8"] = tensors[name]
        rest.remove(name)
    found = dict.fromkeys(_part_of(name, where) for name in rest)
    return Parts(own, prefix, tuple(found), {name: tensors[name] for name in rest})


def _part_of(name: str, where: object) -> str:
    for part, pattern in _PARTS.items():
        if re.match(pattern, name):
            return part
    raise DiffcError(
        f"{where} has a tensor {name!r} of no part that diffc knows",
        fix="take it out of the file if the model does without it",
    )


def unknown_file(names: Iterable[str], where: object, known: str, told: str = "") -> UnsupportedError:
    """The error for a file of no known backbone: what it is if that can be told, else some of its names.

    `told` is what the file calls its model.
    """
    names = sorted(names)
    for pattern, what, fix in _OTHERS:
        if any(re.search(pattern, name) for name in names):
            return UnsupportedError(f"{where} holds {what}, no backbone", fix=fix)
    seen = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    called = f" calls its model {told!r}, and" if told else ":"
    return UnsupportedError(
        f"{where}{called} its tensors are of no backbone that diffc knows ({seen})",
        fix=f"give a file of one of these: {known}; or a folder with config.json",
    )
