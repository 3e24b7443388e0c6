"""Reads a model that is in memory: a diffusers pipeline, or a backbone by itself, as Python has it.

Its weights are recipes over the live tensors: nothing is copied before it is written, and each tensor is read once
for its hash. What was fused into them counts: a LoRA that PEFT has merged is part of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import nn

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.capture.in_memory import capture_object
from diffc.models.captured import captured_family
from diffc.models.family import Family
from diffc.models.registry import backbone_among, components, family_of, known_family
from diffc.models.sources.source import ModelSource
from passes.weights.recipe import Array, Recipe
from passes.weights.sources import keep_lazily

_BITS = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)} | {
    getattr(torch, name): (torch.uint8, getattr(ml_dtypes, name)) for name in ("float8_e4m3fn", "float8_e5m2")
}
"""Types that numpy lacks: the type of the same bits in torch, and the name of ml_dtypes."""
_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")
_QUANTIZER = "_quantizer."


def is_model_object(value: Any) -> bool:
    """Whether `value` is something that `live_source` reads: a module, or a pipeline with components."""
    return isinstance(value, nn.Module) or isinstance(getattr(value, "components", None), Mapping)


def backbone_in(model: Any) -> nn.Module:
    """The backbone of a pipeline, or the module itself, without the wrappers of torch.compile and data parallelism.

    Raises UnsupportedError for a pipeline that has none, and DiffcError for one that is compiled already.
    """
    found = model
    if not isinstance(model, nn.Module):
        found = model.components[_component(model)]
    found = _unwrapped(found)
    if not hasattr(found, "to_json_string"):
        raise DiffcError(
            f"{type(found).__name__} is not a diffusers model: it has no config",
            fix="give a diffusers pipeline or its transformer or unet, in torch",
        )
    module: nn.Module = found
    return module


def _component(pipe: Any) -> str:
    """The name of a pipeline's backbone among its components. Raises UnsupportedError for a pipeline that has none."""
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    named = backbone_among({name: type(_unwrapped(part)).__name__ for name, part in parts.items()})
    if named is None:
        raise UnsupportedError(
            f"this {type(pipe).__name__} has none of the components {', '.join(components())}",
            fix="give a pipeline with a denoising backbone",
        )
    return named


def _unwrapped(module: Any) -> Any:
    while (inner := getattr(module, "_orig_mod", None) or _parallel(module)) is not None:
        module = inner
    return module


def _parallel(module: nn.Module) -> nn.Module | None:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    return module.module if isinstance(module, wrappers) else None


def live_source(model: Any, progress: Callable[[int, int], None] = lambda done, total: None) -> ModelSource:
    """The backbone of a pipeline or module object; `progress` is told of every tensor that is hashed.

    Raises UnsupportedError for a class that diffc does not know, DiffcError for weights that are not there (offloaded)
    or have a LoRA beside them that is not merged.
    """
    backbone = backbone_in(model)
    pipeline = None if backbone is model or isinstance(model, nn.Module) else model
    config = config_of(backbone)
    name = f"{type(model if pipeline is not None else backbone).__name__} in memory"
    family = _family(pipeline, config, name)
    config = dict(family.completed(config, None if pipeline is None else dict(pipeline.config)))
    tensors = live_tensors(backbone)
    weights = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        weights[key] = recipe_of_tensor(tensor)
        progress(number + 1, len(tensors))
    return ModelSource(
        name, Path(name), None, config, family, weights, pipeline=pipeline, origin=_origin(model, backbone)
    )


def _family(pipeline: Any, config: dict[str, Any], name: str) -> Family:
    """The family that a file describes, or one read off calls of a pipeline like this one."""
    known = known_family(config)
    if known is not None or pipeline is None:
        return known or family_of(config, name)
    return captured_family(capture_object(pipeline, _component(pipeline), config), config)


def config_of(backbone: Any) -> dict[str, Any]:
    """config.json of a backbone as diffusers would save it, without the place that it was loaded from."""
    config: dict[str, Any] = json.loads(backbone.to_json_string())
    config.pop("_name_or_path", None)
    return config


def _origin(model: Any, backbone: Any) -> dict[str, Any]:
    """Where a model comes from, for the manifest: its classes, and what it was loaded from."""
    loaded = getattr(getattr(backbone, "config", None), "_name_or_path", None)
    classes = {"class": type(model).__name__, "backbone": type(backbone).__name__}
    return {**classes, **({"loaded_from": str(loaded)} if loaded else {})}


def live_tensors(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a backbone by the names that diffusers saves them under.

    Without quantizers' buffers, and with the merged weights of layers that PEFT has wrapped. Raises DiffcError.
    """
    _refuse_unmerged(backbone)
    state = {key: value for key, value in backbone.state_dict().items() if _QUANTIZER not in key}
    merged = {
        key.replace(".base_layer.", "."): tensor
        for key, tensor in state.items()
        if not any(part in key for part in _LORA)
    }
    for key, tensor in merged.items():
        if tensor.device.type == "meta":
            raise DiffcError(
                f"the weight {key!r} is not in memory: it was offloaded",
                fix="call pipe.remove_all_hooks(), and load the model without sequential offload",
            )
    return merged


def _refuse_unmerged(backbone: nn.Module) -> None:
    """Raise DiffcError for a LoRA that computes beside the weights: what is compiled are the weights."""
    for name, layer in backbone.named_modules():
        if not hasattr(layer, "base_layer") or getattr(layer, "disable_adapters", False):
            continue
        active = set(getattr(layer, "active_adapters", ()) or ()) & set(getattr(layer, "scaling", {}))
        if lacking := sorted(active - set(getattr(layer, "merged_adapters", ()))):
            raise DiffcError(
                f"the LoRA {lacking[0]!r} is loaded and not fused: {name} computes it beside its weight",
                fix="call pipe.fuse_lora() before, or pipe.disable_lora() to compile without it",
            )


def recipe_of_tensor(tensor: torch.Tensor) -> Recipe:
    """A recipe over a live tensor, which is read again when it is written; its key is the hash of its values."""
    key = hashlib.sha256(np.ascontiguousarray(array_of(tensor)).reshape(-1).view(np.uint8).data).hexdigest()
    dtype = array_of(tensor[:0] if tensor.dim() else tensor).dtype
    kept = tensor.detach()
    return keep_lazily(key, lambda: array_of(kept), dtype, tuple(tensor.shape))


def array_of(tensor: torch.Tensor) -> Array:
    """The values as numpy has them: over the tensor's own memory on the CPU, a copy from a GPU."""
    values = tensor.detach().cpu().contiguous()
    bits, dtype = _BITS.get(values.dtype, (None, None))
    if bits is None or dtype is None:
        return np.asarray(values.numpy())
    return np.asarray(values.view(bits).numpy().view(dtype))
