"""diffc/quantize/reweigh.py: scales of changed weights anew, per tensor and per channel; formats that cannot."""

from __future__ import annotations

import numpy as np
import pytest

from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.reweigh import reweighed
from passes.weights.recipe import Recipe

INT8 = {
    "num_bits": 8,
    "axis": 0,
    "block_sizes": None,
    "type": "static",
    "unsigned": False,
    "narrow_range": False,
}
FP8 = INT8 | {"num_bits": [4, 3], "axis": None}


def checkpoint(format: str, settings: dict[str, object], amax: np.ndarray) -> Checkpoint:
    names = ("a.weight_quantizer", "a.input_quantizer", "b.weight_quantizer")
    return Checkpoint("sd3", format, {}, dict.fromkeys(names, settings), dict.fromkeys(names, amax), "old")


@pytest.mark.parametrize(
    ("format", "settings", "shape"), [("fp8", FP8, ()), ("int8", INT8, (4, 1)), ("int8", INT8, (4, 1, 1, 1))]
)
def test_amax_covers_the_new_weight(format: str, settings: dict[str, object], shape: tuple[int, ...]) -> None:
    old = np.full(shape, 0.5, np.float32)
    weight = (
        np.random.default_rng(0)
        .standard_normal((4, 6, 3, 3) if len(shape) == 4 else (4, 6))
        .astype(np.float32)
    )
    recipe = Recipe.of_array(weight)
    found = reweighed(
        checkpoint(format, settings, old),
        {"a.weight": recipe, "b.weight": recipe},
        {"a.weight": recipe},
        "new",
    )
    wanted = np.abs(weight).reshape(4, -1).max(axis=1) if shape else np.abs(weight).max()
    new = found.amax["a.weight_quantizer"]
    assert new.shape == shape
    assert np.all(new.reshape(np.shape(wanted)) >= wanted * (1 - 1e-6))
    assert np.all(
        new.reshape(np.shape(wanted)) <= wanted * (1 + 1 / 64)
    )  # the next scale of 8 significant bits
    assert np.array_equal(found.amax["a.input_quantizer"], old)
    assert np.array_equal(found.amax["b.weight_quantizer"], old)
    assert found.source == "new"


def test_factors_that_depend_on_weights_are_refused() -> None:
    with pytest.raises(DiffcError, match="calibrate with the LoRAs"):
        reweighed(checkpoint("int8_smoothquant", INT8, np.ones((4, 1), np.float32)), {}, {}, "new")
