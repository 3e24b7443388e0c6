"""config.json that lies: one error that names the entry, before a model is built by its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import TensorProto

from diffc.errors import DiffcError
from diffc.models.config_check import check_config, check_numbers
from diffc.models.embedded.tiny import SD3
from diffc.models.registry import FAMILIES, family_of_manifest
from passes.weights.recipe import Recipe, Source

SD3_CONFIG: dict[str, Any] = SD3 | {"_class_name": "SD3Transformer2DModel"}


@pytest.mark.parametrize("value", ["x", None, 0, -2, [2], {"a": 1}, 1e999, 1 << 40])
@pytest.mark.parametrize(
    "key", ["patch_size", "sample_size", "pos_embed_max_size", "in_channels", "out_channels"]
)
def test_an_entry_that_is_no_size(key: str, value: object) -> None:
    check_config(FAMILIES["sd3"], SD3_CONFIG, "config.json")
    with pytest.raises(DiffcError, match=r"config\.json (has|: )|config\.json: a size") as told:
        check_config(FAMILIES["sd3"], SD3_CONFIG | {key: value}, "config.json")
    assert told.value.fix


@pytest.mark.parametrize("key", ["patch_size", "sample_size", "joint_attention_dim"])
def test_an_entry_that_is_missing(key: str) -> None:
    config = {k: v for k, v in SD3_CONFIG.items() if k != key}
    with pytest.raises(DiffcError, match=f"config.json has no {key}"):
        check_config(FAMILIES["sd3"], config, "config.json")
    with pytest.raises(DiffcError, match=f"the manifest has no {key}"):
        family_of_manifest({"family": "sd3", "config": config})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9),
        ("num_single_layers", 5000),
        ("num_hidden_layers", 10**6),
        ("transformer_layers_per_block", [1, [2, 10**5]]),
        ("attention_head_dim", 1 << 40),
        ("in_channels", -(1 << 63)),
        ("pos_embed_max_size", 100_000),
    ],
)
def test_a_number_by_which_a_model_would_be_built_for_ever(key: str, value: object) -> None:
    weights = {
        f"blocks.{i}.weight": Recipe.of_source(Source("raw", "/w", TensorProto.FLOAT, (64, 64)))
        for i in range(90)
    }
    check_numbers(SD3_CONFIG, "config.json", weights)
    with pytest.raises(DiffcError, match=f"config.json has {key} = "):
        check_numbers(SD3_CONFIG | {key: value}, "config.json", weights)


@pytest.mark.parametrize("captured", [{}, {"inputs": 7}, {"inputs": [{"name": 1}]}])
def test_a_captured_interface_that_is_damaged(captured: dict[str, Any]) -> None:
    with pytest.raises(DiffcError, match="interface is damaged"):
        family_of_manifest({"family": "own", "config": {}, "captured": captured})
