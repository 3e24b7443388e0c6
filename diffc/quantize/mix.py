"""One checkpoint of several: each layer with the quantizers that it has in the checkpoint of its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffc.errors import UsageError, unknown_value
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import layer_of
from diffc.quantize.formats import FORMATS, MIXED


def mixed(checkpoints: Mapping[str, Checkpoint], formats: Mapping[str, str]) -> Checkpoint:
    """The checkpoint in which the layer at each path of `formats` is quantized as in the checkpoint of that format.

    Layers that `formats` does not name, or that have format "none", are not quantized. All checkpoints are of the same
    weights. Raises UsageError for a format that has no checkpoint, and for a layer that its checkpoint leaves alone.
    """
    for path, name in formats.items():
        if name == "none":
            continue
        if name not in checkpoints:
            raise unknown_value("format of a layer", name, ("none", *checkpoints))
        if not any(layer_of(quantizer) == path for quantizer in checkpoints[name].settings):
            raise UsageError(f"{name} does not quantize {path}", fix="give the layer another format, or none")
    parts = {name: checkpoint for name, checkpoint in checkpoints.items() if name in formats.values()}

    def picked(values: str) -> dict[str, Any]:
        return {
            key: value
            for name, checkpoint in parts.items()
            for key, value in getattr(checkpoint, values).items()
            if formats.get(_layer(key, values)) == name
        }

    if not parts:
        raise UsageError("the plan quantizes no layer", fix="use --format none")
    used = sorted(parts, key=list(FORMATS).index)
    first = parts[used[0]]
    return replace(
        first,
        format=MIXED.name,
        settings=picked("settings"),
        amax=picked("amax"),
        scaling=picked("scaling"),
        calibration={**first.calibration, "formats": used},
    )


def _layer(key: str, values: str) -> str:
    """The path of the layer that a value belongs to: arrays of scaling have their kind after the quantizer's path."""
    return layer_of(key.rpartition(".")[0] if values == "scaling" else key)
