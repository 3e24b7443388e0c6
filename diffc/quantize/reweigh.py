"""A calibration taken over to changed weights: the scales of weights anew, those of activations as they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from diffc.errors import DiffcError
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of, role_of
from diffc.quantize.formats import find_format
from diffc.quantize.kinds import kind_of
from diffc.quantize.state import Amax, usable_amax
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

BASE = "base"
"""The entry of `Checkpoint.calibration` with the fingerprint of the weights without LoRAs."""


def reweighed(
    checkpoint: Checkpoint, weights: Mapping[str, Recipe], changed: Mapping[str, Recipe], source: str
) -> Checkpoint:
    """`checkpoint` for a model whose weights are `weights`; the layers of `changed` get new scales of their weights.

    `source` is the fingerprint of the new weights. What calibration saw of activations stays: a LoRA moves their
    largest magnitudes little. Raises DiffcError for a format whose factors depend on the weights (SmoothQuant, AWQ,
    SVDQuant): it must be calibrated again.
    """
    algorithm = find_format(checkpoint.format).algorithm
    if algorithm not in ("max", None):
        raise DiffcError(
            f"the calibration of {checkpoint.format} has factors that depend on the weights, which LoRAs change",
            fix="calibrate with the LoRAs: leave --from-checkpoint out, and give --lora to `diffc compile`",
        )
    amax = dict(checkpoint.amax)
    for path in amax:
        name = f"{layer_of(path)}.weight"
        if role_of(path) == "weight_quantizer" and name in changed:
            amax[path] = _amax(path, weights[name], amax[path], checkpoint)
    return replace(checkpoint, amax=amax, source=source)


def _amax(path: str, weight: Recipe, old: Amax, checkpoint: Checkpoint) -> Amax:
    """The largest magnitudes of a weight in the shape that `old` has: of all of it, or of each channel."""
    import torch

    values = np.abs(evaluate(weight).astype(np.float32))
    axes = tuple(i for i in range(values.ndim) if old.ndim != values.ndim or old.shape[i] == 1)
    found = np.asarray(values.max(axis=axes)).reshape(old.shape)
    kind = kind_of(checkpoint.settings[path])
    new: Amax = usable_amax(path, torch.from_numpy(found), kind).numpy()
    return new
