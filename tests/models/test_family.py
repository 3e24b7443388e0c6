"""What every family says of its backbone: held against the diffusers class and its pipelines."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from diffc.cache.presets import PRESETS
from diffc.errors import DiffcError
from diffc.models.embedded import tiny
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import FAMILIES
from diffc.models.sources.backbone import build_backbone
from diffc.models.spec import Shape

CONFIGS: dict[str, dict[str, Any]] = {"sd3": tiny.SD35, "flux": tiny.FLUX, "sdxl": tiny.SDXL}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_interface_is_that_of_the_class(name: str) -> None:
    family, config, shape = FAMILIES[name], CONFIGS[name], Shape(2, 128, 192, 11)
    values = random_inputs(family, config, shape, dtype=torch.float32, seed=3)
    assert {key: tuple(value.shape) for key, value in values.items()} == family.input_shapes(config, shape)
    backbone = build_backbone(family, config, torch.float32)
    with torch.no_grad():
        output = backbone(**forward_kwargs(family, config, values))
    module, _, kind = family.output_class.partition(":")
    assert type(output) is getattr(import_module(module), kind)
    sizes = family.sizes(shape)
    expected = [sizes[d] if isinstance(d, str) else d for d in family.output_dims(config)]
    assert list(output.sample.shape) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ends_of_the_network_stay_unquantized_and_its_blocks_do_not(name: str) -> None:
    family = FAMILIES[name]
    with torch.device("meta"):
        backbone = build_backbone(family, CONFIGS[name], torch.float32)
    layers = [path for path, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    kept = [path for path in layers if re.match(family.unquantized, path)]
    outside = [path for path in layers if "blocks" not in path and not path.startswith(("mid_", "proj_out"))]
    assert set(outside) <= set(kept)
    inside = [path for path in kept if path not in outside]
    assert all(path.endswith(("time_emb_proj", "conv_shortcut", "proj_out")) for path in inside)
    assert len(kept) < len(layers) / 3


@pytest.mark.parametrize("name", FAMILIES)
def test_attributes_are_those_of_the_backbone(name: str) -> None:
    family = FAMILIES[name]
    backbone: Any = build_backbone(family, CONFIGS[name], torch.float32)
    for path, value in family.attributes(CONFIGS[name]).items():
        found = backbone
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value


@pytest.mark.parametrize("name", FAMILIES)
def test_names_of_others_exist(name: str) -> None:
    family = FAMILIES[name]
    assert hasattr(diffusers, family.backbone_class)
    assert set(family.cache_plans) <= PRESETS.keys()
    assert str(family) == name


def test_shapes_that_do_not_fit_are_refused() -> None:
    family, config = FAMILIES["sd3"], CONFIGS["sd3"]
    assert family.check(config, Shape(1, 64, 96, 3)) == Shape(1, 64, 96, 3)
    with pytest.raises(DiffcError, match="width 72 px does not fit sd3\n  Fix: use a multiple of 16"):
        family.check(config, Shape(1, 64, 72, 3))
    with pytest.raises(DiffcError, match="size below 1"):
        family.check(config, Shape(0, 64, 64, 3))
    with pytest.raises(DiffcError, match=r"height is 130 at .*, and this model ends at 128"):
        family.check(config, Shape(1, 1040, 64, 3))


UNETS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, tuple[str | int, ...]]]] = {
    "base": ({}, None, {"text_embeds": ("batch", 64), "time_ids": ("batch", 6)}),
    "inpaint": ({"in_channels": 9}, {}, {"sample": ("batch", 9, "height", "width")}),
    "lcm": ({"time_cond_proj_dim": 16}, None, {"timestep_cond": ("batch", 16)}),
    "refiner": (
        {"projection_class_embeddings_input_dim": 40 + 5 * tiny.TIME_ID_WIDTH},
        {"requires_aesthetics_score": True},
        {"text_embeds": ("batch", 40), "time_ids": ("batch", 5)},
    ),
    "refiner alone": (
        {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 40 + 5 * tiny.TIME_ID_WIDTH},
        None,
        {"text_embeds": ("batch", 40), "time_ids": ("batch", 5)},
    ),
    "kolors": (
        {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"},
        None,
        {"encoder_hidden_states": ("batch", "text", 48), "text_embeds": ("batch", 64)},
    ),
    "times as classes": ({"class_embed_type": "timestep"}, None, {"class_labels": ("batch",)}),
    "numbers of classes": ({"num_class_embeds": 10}, None, {"class_labels": ("batch",)}),
    "projected classes": (
        {"class_embed_type": "projection"},
        None,
        {"class_labels": ("batch", tiny.SDXL["projection_class_embeddings_input_dim"])},
    ),
}


@pytest.mark.parametrize("kind", UNETS)
def test_conditions_of_a_unet_are_those_of_its_config(kind: str) -> None:
    """Held against diffusers' own forward, which refuses any other shape."""
    changed, index, expected = UNETS[kind]
    family, shape = FAMILIES["sdxl"], Shape(2, 128, 64, 7)
    config = family.completed(tiny.SDXL | changed, index)
    dims = family.input_dims(config)
    assert {name: dims[name] for name in expected} == expected
    values = random_inputs(family, config, shape, dtype=torch.float32, seed=3)
    with torch.no_grad():
        backbone = build_backbone(family, config, torch.float32)
        output = backbone(**forward_kwargs(family, config, values)).sample
        unconditioned = {**values, "timestep_cond": torch.zeros(2, 16)} if kind == "lcm" else None
        if unconditioned is not None:
            assert not torch.equal(backbone(**forward_kwargs(family, config, unconditioned)).sample, output)
    assert output.shape == (2, 4, 16, 8)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cross_attention_dim": 64}, r"five sizes .* or six[\s\S]*requires_aesthetics_score"),
        ({"class_embed_type": "words"}, "class_embed_type='words', which adds an input"),
        ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj'"),
    ],
)
def test_a_unet_that_does_not_tell_its_inputs_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(DiffcError, match=says):
        FAMILIES["sdxl"].completed(tiny.SDXL | changed, None)
