"""The families are listed from their folder, and found by name or by a backbone's config."""

from __future__ import annotations

from typing import Any

import pytest

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import FAMILIES, components, family_of, find_family


def test_the_folder_is_listed() -> None:
    assert list(FAMILIES) == ["flux", "sd3", "sdxl"]
    assert all(family.name == name for name, family in FAMILIES.items())
    assert components() == ("transformer", "unet")


def test_names() -> None:
    assert find_family("sdxl") is FAMILIES["sdxl"]
    with pytest.raises(DiffcError, match=r"unknown model family 'sd1'\. Known: flux, sd3, sdxl"):
        find_family("sd1")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "sd3"),
        ({"_class_name": "FluxTransformer2DModel", "num_layers": 1}, "flux"),
        ({"_class_name": "UNet2DConditionModel", "addition_embed_type": "text_time"}, "sdxl"),
    ],
)
def test_configs(config: dict[str, Any], name: str) -> None:
    assert family_of(config, "x").name == name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "QwenImageTransformer2DModel"}, "class QwenImageTransformer2DModel."),
        (
            {"_class_name": "UNet2DConditionModel", "addition_embed_type": None},
            "class UNet2DConditionModel with addition_embed_type=None.",
        ),
        ({"_class_name": ["x"]}, r"class \['x'\]."),
        ({}, "class None."),
    ],
)
def test_what_no_family_takes(config: dict[str, Any], said: str) -> None:
    known = (
        r"Known: FluxTransformer2DModel \(flux\), SD3Transformer2DModel \(sd3\), "
        r"UNet2DConditionModel with addition_embed_type='text_time' \(sdxl\)"
    )
    with pytest.raises(UnsupportedError, match=f"a/config.json: no support for a backbone of {said} {known}"):
        family_of(config, "a/config.json")
