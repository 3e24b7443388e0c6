"""The checkpoint of a file that is quantized already: how its inputs are quantized."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import torch

from diffc.compile.stored import FORMAT_OF
from diffc.models.sources.backbone import FakeBackbone, quiet_libraries
from diffc.models.sources.source import ModelSource
from diffc.models.stored.held import Held, HeldInput
from diffc.quantize.checkpoint import LIBRARIES, Checkpoint
from diffc.quantize.fingerprint import backbone_config
from diffc.quantize.formats import STORED
from diffc.quantize.kinds import KINDS, Settings
from diffc.quantize.modelopt_file import settings_of_format
from diffc.quantize.state import usable_amax
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe


def held_checkpoint(source: ModelSource, backbone: FakeBackbone) -> Checkpoint | None:
    """The quantizers of inputs, and the factors of their channels; None where the file has weights alone.

    A scale is that of the file, moved up by at most 1/128 of its range to one that every compute type holds.
    """
    active = {name: layer for name, layer in source.held.items() if _acts(layer)}
    if not active:
        return None
    with quiet_libraries():
        kinds = sorted({layer.input.kind for layer in active.values() if layer.input is not None})
        known = {kind: settings_of_format(FORMAT_OF[kind])["input_quantizer"] for kind in kinds}
    settings, amax = dict[str, Settings](), dict[str, Any]()
    for name, layer in active.items():
        if layer.input is None:
            continue
        path = f"{name}.input_quantizer"
        settings[path] = known[layer.input.kind]
        if (found := _amax(path, layer.input)) is not None:
            amax[path] = found
    return Checkpoint(
        source.family.name,
        STORED.name,
        backbone_config(backbone.module),
        settings,
        amax,
        source.fingerprint,
        {"file": source.path.name},
        {library: metadata.version(library) for library in LIBRARIES},
        {key: value for name, layer in active.items() for key, value in _scaling(name, layer).items()},
    )


def _acts(layer: Held) -> bool:
    return layer.input is not None or layer.pre_quant_scale is not None or layer.low_rank is not None


def _amax(path: str, given: HeldInput) -> Any:
    kind = KINDS[given.kind]
    if not kind.has_amax or given.scale is None:
        return None
    scale = torch.tensor(float(np.asarray(evaluate(given.scale)).astype(np.float32)))
    return usable_amax(path, scale * kind.bound, kind).numpy()


def _scaling(name: str, layer: Held) -> dict[str, Any]:
    found: dict[str, Recipe] = {}
    if layer.pre_quant_scale is not None:
        found[f"{name}.input_quantizer.pre_quant_scale"] = layer.pre_quant_scale
    if layer.low_rank is not None:
        for side, recipe in zip("ab", layer.low_rank, strict=True):
            found[f"{name}.weight_quantizer.svdquant_lora_{side}"] = recipe
    return {key: np.asarray(evaluate(recipe)).astype(np.float32) for key, recipe in found.items()}
