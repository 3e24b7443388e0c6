"""The kinds of quantizers: their rows, and how settings tell them apart."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from diffc.errors import DiffcError
from diffc.quantize.kinds import KINDS, block_size_of, kind_of
from passes.weights.evaluate import evaluate

STATIC = [kind for kind in KINDS.values() if not kind.dynamic]


def test_bounds_are_the_largest_values_of_the_types() -> None:
    e4m3 = torch.finfo(torch.float8_e4m3fn).max
    bounds = {name: kind.bound for name, kind in KINDS.items()}
    nvfp4 = {"nvfp4": 6 * e4m3, "nvfp4_four_six": 6 * 256}
    assert bounds == {"int8": 127, "int4": 7, "fp8": e4m3, **nvfp4, "mxfp8": e4m3}
    bits = {"int8": 8, "int4": 4, "fp8": 8, "nvfp4": 4, "nvfp4_four_six": 4, "mxfp8": 8}
    assert {name: kind.bits for name, kind in KINDS.items()} == bits
    assert KINDS["nvfp4_four_six"].codes == KINDS["nvfp4"].codes == "nvfp4"


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_known_by_its_attributes(name: str) -> None:
    """As a format has them, and as JSON gives them back."""
    kind = KINDS[name]
    assert kind_of(kind.attributes) is kind
    settings = json.loads(json.dumps({"block_sizes": None, **kind.attributes}))
    assert kind_of(settings) is kind
    assert block_size_of(settings) == {"int4": 128, "nvfp4": 16, "nvfp4_four_six": 16, "mxfp8": 32}.get(name)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_bits": 6, "block_sizes": None},
        {"num_bits": 8, "block_sizes": {"-1": 128, "type": "static"}},
        {"num_bits": [4, 3], "block_sizes": {"-1": 128, "-2": 128}},
        {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "static"}},
        {"num_bits": [2, 1], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}},  # MXFP4
    ],
)
def test_others_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(DiffcError, match="is not of a kind that diffc compiles"):
        kind_of(settings)


@pytest.mark.parametrize("kind", STATIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_round_trip_saturates_and_gives_steps(kind: Any, dtype: torch.dtype) -> None:
    x = (torch.randn(400, generator=torch.Generator().manual_seed(5)) * 5).to(dtype)
    scale = torch.tensor(2.0**-4 if kind.bound > 100 else 0.5)
    x = torch.cat([x, torch.tensor([1e4, -1e4]).to(dtype)])
    out = kind.round_trip(x, scale)
    assert (out.dtype, float(out.max()), float(out.min())) == (dtype, kind.bound * scale, kind.lowest * scale)
    assert torch.equal(kind.round_trip(out, scale), out)
    inside = (x.abs() < kind.bound * scale) & (x.abs() > scale)
    assert ((out - x).abs()[inside] <= (scale / 2 if kind.name != "fp8" else x.abs()[inside] / 16)).all()


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.has_amax], ids=str)
def test_the_recipe_of_a_scale(kind: Any, shape: tuple[int, ...]) -> None:
    amax = np.abs(np.random.default_rng(8).standard_normal(shape)).astype(np.float32) + np.float32(0.1)
    recipe = kind.scale_recipe(np.asarray(amax))
    assert recipe.shape == shape
    np.testing.assert_allclose(evaluate(recipe), amax / kind.bound, rtol=2e-7)
