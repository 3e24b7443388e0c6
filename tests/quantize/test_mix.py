"""One checkpoint of several."""

from __future__ import annotations

import numpy as np
import pytest

from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import MIXED
from diffc.quantize.mix import mixed

LAYERS = ("a.to_q", "a.to_k", "ff.net.0")


def checkpoint_of(format: str, layers: tuple[str, ...], seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)
    names = [f"{layer}.{role}_quantizer" for layer in layers for role in ("input", "weight")]
    settings = {name: {"num_bits": 8, "of": format} for name in names}
    amax = {name: rng.random(()).astype(np.float32) for name in names}
    scaling = {
        f"{layer}.input_quantizer.pre_quant_scale": rng.random(4).astype(np.float32) for layer in layers
    }
    return Checkpoint("sd3", format, {}, settings, amax, "source", {"steps": 4}, {}, scaling)


def test_each_layer_is_that_of_its_format() -> None:
    parts = {"nvfp4": checkpoint_of("nvfp4", LAYERS, 1), "fp8": checkpoint_of("fp8", LAYERS[:2], 2)}
    found = mixed(parts, {"a.to_q": "fp8", "a.to_k": "none", "ff.net.0": "nvfp4"})
    assert (found.format, found.source, found.calibration) == (
        MIXED.name,
        "source",
        {"steps": 4, "formats": ["fp8", "nvfp4"]},
    )
    expected = {"a.to_q": parts["fp8"], "ff.net.0": parts["nvfp4"]}
    for values in ("settings", "amax", "scaling"):
        theirs = {
            key: value
            for layer, part in expected.items()
            for key, value in getattr(part, values).items()
            if key.startswith(f"{layer}.")
        }
        assert getattr(found, values) == theirs


def test_what_no_checkpoint_has_is_refused() -> None:
    parts = {"fp8": checkpoint_of("fp8", LAYERS[:2], 2)}
    for plan, message in (
        ({"a.to_q": "int8"}, "int8"),
        ({"ff.net.0": "fp8"}, "fp8 does not quantize ff.net.0"),
        ({"a.to_q": "none"}, "quantizes no layer"),
    ):
        with pytest.raises(DiffcError, match=message):
            mixed(parts, plan)
