"""Shape ranges: what --profile means for each family, and what holds without it."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from typing import Any

import pytest

from diffc.errors import DiffcError
from diffc.models.embedded import tiny
from diffc.models.family import Family
from diffc.models.profiles import default_profile, parse_profile
from diffc.models.registry import FAMILIES
from diffc.models.spec import Shape

CONFIGS: dict[str, dict[str, Any]] = {"sd3": tiny.SD35, "flux": tiny.FLUX, "sdxl": tiny.SDXL}
AXES = ("batch", "height", "width", "text")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> tuple[Family, dict[str, Any]]:
    return FAMILIES[request.param], CONFIGS[request.param]


def test_the_default_encloses_the_native_shape(family: tuple[Family, dict[str, Any]]) -> None:
    profile = default_profile(*family)
    assert profile.optimum == family[0].native(family[1])
    ranges = list(zip(*map(astuple, (profile.minimum, profile.optimum, profile.maximum)), strict=True))
    assert all(low <= middle <= high for low, middle, high in ranges)
    dynamic = [
        name.name for name, (low, _, high) in zip(fields(profile.minimum), ranges, strict=True) if low < high
    ]
    assert tuple(dynamic) == AXES  # and a picture has one frame
    for shape in (profile.minimum, profile.optimum, profile.maximum):
        assert family[0].check(family[1], shape) == shape


def test_axes_replace_the_default_and_leave_the_others(family: tuple[Family, dict[str, Any]]) -> None:
    default = default_profile(*family)
    assert parse_profile("", *family) == default
    profile = parse_profile(" batch=1:3:5 , height=128,text=9:10:11,", *family)
    assert profile.minimum == replace(default.minimum, batch=1, height=128, text=9)
    assert profile.optimum == replace(default.optimum, batch=3, height=128, text=10)
    assert profile.maximum == replace(default.maximum, batch=5, height=128, text=11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens=4", "unknown axis 'tokens'. Known: batch, height, width, text"),
        ("batch", "is not a size"),
        ("batch=", "is not a size"),
        ("batch=1.5", "is not a size"),
        ("batch=1:2", "is not a size"),
        ("batch=1:2:3:4", "is not a size"),
        ("batch=3:2:4", "in ascending order"),
        ("text=0", "a size below 1"),
        ("batch=-1:2:4", "a size below 1"),
        ("width=130", "width 130 px does not fit"),
    ],
)
def test_everything_else_is_refused(text: str, message: str, family: tuple[Family, dict[str, Any]]) -> None:
    with pytest.raises(DiffcError, match=message):
        parse_profile(text, *family)


def test_an_image_beyond_the_position_table_is_refused() -> None:
    """tiny-sd3 has positions for 64 x 64 patches of 2 x 2 latents: 1024 pixels."""
    spec, config = FAMILIES["sd3"], CONFIGS["sd3"]
    assert parse_profile("height=512:512:1024", spec, config).maximum.height == 1024
    with pytest.raises(DiffcError, match=r"is 130 at .*, and this model ends at 128"):
        parse_profile("height=512:512:1040", spec, config)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis_moves_an_input(axis: str, family: tuple[Family, dict[str, Any]]) -> None:
    spec, config = family
    shape = Shape(2, 128, 192, 24)
    other = replace(shape, **{axis: 2 * getattr(shape, axis)})
    assert spec.input_shapes(config, shape) != spec.input_shapes(config, other)
