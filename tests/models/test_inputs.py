"""Random inputs: seeded, plausible, of the family's shapes, and nested as forward() takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffc.models.embedded import tiny
from diffc.models.inputs import forward_kwargs, random_inputs
from diffc.models.registry import FAMILIES
from diffc.models.spec import Shape

CONFIGS: dict[str, dict[str, Any]] = {"sd3": tiny.SD35, "flux": tiny.FLUX, "sdxl": tiny.SDXL}


@pytest.mark.parametrize("family", CONFIGS)
def test_random_inputs_are_seeded_plausible_and_of_the_specs_shape(family: str) -> None:
    spec, config, shape = FAMILIES[family], CONFIGS[family], Shape(2, 128, 192, 21)
    values = random_inputs(spec, config, shape, dtype=torch.float16, seed=3)
    again = random_inputs(spec, config, shape, dtype=torch.float16, seed=3)
    other = random_inputs(spec, config, shape, dtype=torch.float16, seed=4)
    assert {n: tuple(v.shape) for n, v in values.items()} == spec.input_shapes(config, shape)
    for item in spec.inputs(config):
        value = values[item.name]
        assert torch.equal(value, again[item.name])
        assert value.dtype == (torch.float16 if item.dtype == "model" else torch.float32)
        assert torch.isfinite(value).all()
        assert value.abs().sum() > 0
        if item.sample != "image_ids":  # positions are no matter of chance
            assert not torch.equal(value, other[item.name])


def test_flux_positions_are_a_grid() -> None:
    spec, config = FAMILIES["flux"], CONFIGS["flux"]
    values = random_inputs(spec, config, Shape(1, 64, 96, 5), dtype=torch.float32, seed=0)
    ids = values["img_ids"]
    assert len(ids.unique(dim=0)) == len(ids) == 4 * 6
    assert ids[:, 1].max() == 3
    assert ids[:, 2].max() == 5


def test_nested_inputs_reach_forward_nested() -> None:
    spec, config = FAMILIES["sdxl"], CONFIGS["sdxl"]
    named = {item.name: item.name for item in spec.inputs(config)}
    kwargs = forward_kwargs(spec, config, named)
    assert kwargs["added_cond_kwargs"] == {"text_embeds": "text_embeds", "time_ids": "time_ids"}
    flat = {k for k in kwargs if k != "added_cond_kwargs"} | set(kwargs["added_cond_kwargs"])
    assert flat == set(named)
