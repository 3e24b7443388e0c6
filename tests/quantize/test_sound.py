"""Scales that cannot be right are refused by name: a comparison of two sides that both have them finds nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffc.errors import DiffcError
from diffc.quantize.kinds import KINDS
from diffc.quantize.sound import check_settings, check_shapes, check_values
from diffc.quantize.state import usable_amax

Arrays = dict[str, Any]
INT8 = {
    "num_bits": 8,
    "axis": 0,
    "block_sizes": None,
    "type": "static",
    "unsigned": False,
    "narrow_range": True,
}
INT4 = INT8 | {"num_bits": 4, "axis": None, "block_sizes": {"-1": 128, "type": "static"}}
WEIGHT, INPUT = "a.weight_quantizer", "a.input_quantizer"
FACTOR, OUTER, INNER = (f"{INPUT}.pre_quant_scale", f"{WEIGHT}.svdquant_lora_b", f"{WEIGHT}.svdquant_lora_a")


def arrays() -> tuple[Arrays, Arrays]:
    """amax and scaling of a layer [6, 256] that can be right."""
    rng = np.random.default_rng(3)
    positive = lambda *shape: rng.uniform(1e-6, 40, shape).astype(np.float32)  # noqa: E731  # one line
    amax = {WEIGHT: positive(6, 1), INPUT: positive()}
    scaling = {FACTOR: positive(256), OUTER: positive(6, 4) - 9, INNER: positive(4, 256) - 9}
    return amax, scaling


def check(amax: Arrays, scaling: Arrays) -> None:
    check_values("c", amax, scaling)
    settings = {WEIGHT: INT8, INPUT: INT8 | {"axis": None}}
    check_shapes("c", settings, amax, scaling, {"a": (6, 256)})


def test_scales_that_can_be_right() -> None:
    check(*arrays())
    check_shapes("c", {WEIGHT: INT4}, {WEIGHT: np.ones((12, 1), np.float32)}, {}, {"a": (6, 256)})
    check_settings("c", {WEIGHT: INT8, INPUT: INT4})


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [WEIGHT, INPUT, FACTOR])
def test_a_value_that_no_scale_has(name: str, value: float) -> None:
    amax, scaling = arrays()
    own = amax if name in amax else scaling
    own[name] = own[name].copy()
    own[name].reshape(-1)[-1] = value
    with pytest.raises(DiffcError, match=name):
        check(amax, scaling)


@pytest.mark.parametrize(
    "harm",
    [
        lambda a, s: a.update({WEIGHT: a[WEIGHT].astype(np.int32)}),
        lambda a, s: a.update({WEIGHT: a[WEIGHT].astype(np.float16)}),
        lambda a, s: a.update({WEIGHT: np.ones((3, 5), np.float32)}),
        lambda a, s: a.update({WEIGHT: np.ones(0, np.float32)}),
        lambda a, s: a.update({INPUT: np.ones(256, np.float32)}),
        lambda a, s: s.pop(INNER),
        lambda a, s: s.update({OUTER: s[OUTER][:, :3]}),
        lambda a, s: s.update({FACTOR: s[FACTOR][:128]}),
        lambda a, s: s.update({INNER: np.full((4, 256), np.nan, np.float32)}),
        lambda a, s: s.update({"b.input_quantizer.pre_quant_scale": s[FACTOR]}),
    ],
)
def test_an_array_that_does_not_fit(harm: Callable[[Arrays, Arrays], object]) -> None:
    amax, scaling = arrays()
    harm(amax, scaling)
    with pytest.raises(DiffcError, match=r"Fix: (calibrate|give)"):
        check(amax, scaling)


@pytest.mark.parametrize(
    "blocks",
    [
        {"-1": 0, "type": "static"},
        {"-1": -16, "type": "static"},
        {"-1": "16", "type": "static"},
        {"type": "static"},
        {"-1": 16, "type": "dynamic"},
        {"-1": 16, "type": "dynamic", "scale_bits": 7},
    ],
)
def test_blocks_that_cannot_be(blocks: dict[str, Any]) -> None:
    with pytest.raises(DiffcError, match="cannot be"):
        check_settings("c", {WEIGHT: INT4 | {"block_sizes": blocks}})


def test_a_file_of_modelopt_with_an_amax_below_zero_is_refused() -> None:
    amax = torch.tensor([0.3, -1.5, 2.0])
    with pytest.raises(DiffcError, match="below zero"):
        usable_amax(WEIGHT, amax, KINDS["int8"])
    assert (usable_amax(WEIGHT, amax.relu(), KINDS["int8"]) > 0).all()
