"""Stable Diffusion XL: a UNet of residual convolutions and cross attention, with size and pooled-text conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffc.errors import UnsupportedError
from diffc.models.family import Family, Optimum
from diffc.models.spec import VAE_SCALE, Config, DimSpec, GraphFacts, InputSpec, Shape, latent_sizes

_TIME_IDS = "_time_ids"
"""Entry that `_completed` adds to a config of a UNet whose pipeline gives another number of sizes than six."""
_CLASS_INPUTS: Mapping[str, Callable[[Config], tuple[str | int, ...]]] = {
    "timestep": lambda _: ("batch",),
    "identity": lambda config: ("batch", 4 * int(config["block_out_channels"][0])),
    "projection": lambda config: ("batch", int(config["projection_class_embeddings_input_dim"])),
    "simple_projection": lambda config: ("batch", int(config["projection_class_embeddings_input_dim"])),
}
"""`class_embed_type` of a config.json -> the dimensions of class_labels (UNet2DConditionModel._set_class_embedding)."""


def _pooled_width(config: Config, time_ids: int) -> int:
    """Width of text_embeds: what is left of the embedding's input beside the sizes (UNet2DConditionModel)."""
    return int(config["projection_class_embeddings_input_dim"]) - time_ids * int(
        config["addition_time_embed_dim"]
    )


def _text_width(config: Config) -> int:
    """Width of encoder_hidden_states: the UNet projects the prompt itself where it has an encoder_hid_dim (Kolors)."""
    return int(config.get("encoder_hid_dim") or config["cross_attention_dim"])


def _inputs(config: Config) -> tuple[InputSpec, ...]:
    condition, sizes = "added_cond_kwargs", int(config.get(_TIME_IDS, 6))
    return (
        InputSpec("sample", ("batch", config["in_channels"], "height", "width")),
        InputSpec("timestep", (), "float32", "timestep"),
        InputSpec("encoder_hidden_states", ("batch", "text", _text_width(config))),
        InputSpec("text_embeds", ("batch", _pooled_width(config, sizes)), path=(condition, "text_embeds")),
        InputSpec("time_ids", ("batch", sizes), "float32", "time_ids", path=(condition, "time_ids")),
        *_further_inputs(config),
    )


def _further_inputs(config: Config) -> Iterator[InputSpec]:
    """Inputs of UNets that are distilled with guidance (LCM), or conditioned on classes."""
    if width := config.get("time_cond_proj_dim"):
        yield InputSpec("timestep_cond", ("batch", int(width)))
    if kind := config.get("class_embed_type"):
        yield InputSpec("class_labels", _CLASS_INPUTS[kind](config))
    elif (classes := config.get("num_class_embeds")) is not None:  # a table, which class numbers point into
        yield InputSpec("class_labels", ("batch",), "int64", "seen", high=int(classes) - 1)


def _completed(config: Config, index: Mapping[str, Any] | None) -> Config:
    """The config with the number of time ids, where it is not six: the refiner's pipeline gives five.

    `index` is model_index.json of the pipeline; None for a UNet alone, whose text width tells: base models have two
    text encoders side by side, wider than the pooled text, the refiner has one, as wide.
    """
    _refuse_unknown(config)
    if index is not None:
        return {**config, _TIME_IDS: 5} if index.get("requires_aesthetics_score") else config
    width, five, six = _text_width(config), _pooled_width(config, 5), _pooled_width(config, 6)
    if five == width:
        return {**config, _TIME_IDS: 5}
    if six < width or config.get("time_cond_proj_dim") or config.get("encoder_hid_dim"):
        return config
    raise UnsupportedError(
        "this UNet alone does not tell its inputs: its pipeline gives five sizes (time_ids) as the SDXL refiner's does,"
        f" with text_embeds of {five}, or six as the SDXL base model's, with text_embeds of {six}",
        fix="give the pipeline's folder, whose model_index.json tells (requires_aesthetics_score)",
    )


def _refuse_unknown(config: Config) -> None:
    """Raise UnsupportedError for an entry of config.json that adds an input which diffc does not feed."""
    known = {
        "encoder_hid_dim_type": (None, "text_proj"),
        "class_embed_type": (None, *_CLASS_INPUTS),
    }
    for entry, values in known.items():
        if config.get(entry) not in values:
            supported = ", ".join(map(str, values))
            raise UnsupportedError(
                f"config.json of this UNet has {entry}={config[entry]!r}, which adds an input that diffc does not have",
                fix=f"compile a UNet whose {entry} is one of: {supported}",
            )


def _downscale(config: Config) -> int:
    """Every level but the last halves the image; skip connections meet only when it divides evenly."""
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _dims(config: Config) -> tuple[DimSpec, ...]:
    multiple = _downscale(config)
    # From batch 64 on, diffusers' Upsample2D takes another path, which one graph cannot hold.
    return DimSpec("batch", 1, 63), DimSpec("height", multiple), DimSpec("width", multiple), DimSpec("text")


def _native(config: Config) -> Shape:
    pixels = config["sample_size"] * VAE_SCALE
    return Shape(2, pixels, pixels, 77)


_WIDTHS = (320, 640, 1280)
"""Channels of the levels of released models."""


def _config_of(facts: GraphFacts) -> dict[str, Any]:
    channels, pooled = facts.size("sample", 1), facts.size("text_embeds", 1)
    embedded = facts.weight("add_embedding.linear_1.weight", 1, pooled + 6 * 256)
    levels = tuple(
        facts.weights[name][0]
        for name in (f"down_blocks.{level}.resnets.0.conv1.weight" for level in range(8))
        if name in facts.weights
    )
    return {
        "sample_size": 128,
        "in_channels": channels,
        "out_channels": facts.output_size(1, facts.weight("conv_out.weight", 0, channels)),
        "cross_attention_dim": facts.size("encoder_hidden_states", 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (embedded - pooled) // 6,
        "projection_class_embeddings_input_dim": embedded,
        "block_out_channels": list(levels or _WIDTHS),
    }


FAMILY = Family(
    name="sdxl",
    backbone_class="UNet2DConditionModel",
    requires={"addition_embed_type": "text_time"},
    component="unet",
    completed=_completed,
    inputs=_inputs,
    output="out_sample",
    output_dims=lambda config: ("batch", config["out_channels"], "height", "width"),
    dims=_dims,
    sizes=latent_sizes,
    pixel_multiple=lambda config: VAE_SCALE * _downscale(config),
    native=_native,
    unquantized=r".*(time_emb_proj|time_embedding|conv_in|conv_out|conv_shortcut|add_embedding|class_embedding|encoder_hid_proj)",
    calibration={"guidance_scale": 5.0},
    output_class="diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput",
    # StableDiffusionXLPipeline compares the width of the pooled text with this layer's.
    attributes=lambda config: {
        "add_embedding.linear_1.in_features": config["projection_class_embeddings_input_dim"]
    },
    cache_plans=("deepcache", "tgate", "modelopt-sdxl"),
    optimum=Optimum("ORTStableDiffusionXLPipeline"),
    config_of=_config_of,
)
