"""A file that is quantized already: its codes are kept, and its inputs are quantized as it says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np
import torch

from diffc.backends.sm import check_format_sms
from diffc.backends.target import Target
from diffc.errors import UsageError
from diffc.models.sources.backbone import FakeBackbone, quiet_libraries
from diffc.models.sources.source import ModelSource
from diffc.models.stored.held import Held, HeldInput
from diffc.quantize.checkpoint import LIBRARIES, Checkpoint
from diffc.quantize.fingerprint import backbone_config
from diffc.quantize.formats import FORMATS, STORED, Format, find_format
from diffc.quantize.kinds import KINDS, Settings
from diffc.quantize.modelopt_file import settings_of_format
from diffc.quantize.state import usable_amax
from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe

AUTO = "auto"
"""The format of a compile that names none: "stored" for a file that is quantized, "none" for any other."""
_FORMAT_OF = {"fp8": "fp8", "int8": "int8", "int4": "int4_awq", "nvfp4": "nvfp4", "mxfp8": "mxfp8"}
"""The format that has a kind of code, which says where it runs."""


def format_of(name: str, source: ModelSource) -> Format:
    """The format that `name` means for this model. Raises UsageError for "stored" where nothing is quantized."""
    if name == AUTO:
        return STORED if source.held else FORMATS["none"]
    if name == STORED.name and not source.held:
        raise UsageError(
            f"{source.path} holds no quantized layer, so there is nothing stored to keep",
            fix="choose a format with --format, or leave it out",
        )
    return find_format(name)


def check_held(source: ModelSource, targets: Sequence[Target], sms: Sequence[int]) -> None:
    """Raise UnsupportedError when a target or a GPU lacks a kind of code that the file holds."""
    for kind in sorted(kinds_of(source)):
        fmt = FORMATS[_FORMAT_OF[kind]]
        check_format_sms(fmt.name, fmt.min_sm, sms)
        for target in targets:
            target.check_format(fmt.name)


def kinds_of(source: ModelSource) -> set[str]:
    """The kinds of codes that weights and inputs of the file have."""
    inputs = {layer.input.kind for layer in source.held.values() if layer.input is not None}
    return {layer.kind for layer in source.held.values()} | inputs


def held_checkpoint(source: ModelSource, backbone: FakeBackbone) -> Checkpoint | None:
    """The quantizers of inputs, and the factors of their channels; None where the file has weights alone.

    A scale is that of the file, moved up by at most 1/128 of its range to one that every compute type holds.
    """
    active = {name: layer for name, layer in source.held.items() if _acts(layer)}
    if not active:
        return None
    with quiet_libraries():
        kinds = sorted({layer.input.kind for layer in active.values() if layer.input is not None})
        known = {kind: settings_of_format(_FORMAT_OF[kind])["input_quantizer"] for kind in kinds}
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


def described(source: ModelSource) -> str:
    """The layers held, in words: "112 fp8, 3 nvfp4"."""
    kinds = [layer.kind for layer in source.held.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
