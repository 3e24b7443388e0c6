"""A compile of what Python has in memory: a diffusers pipeline or backbone, with LoRA fused into it, or quantized."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffc.errors import DiffcError
from diffc.models.sources.backbone import build_backbone, quiet_libraries
from diffc.models.sources.live import (
    array_of,
    backbone_in,
    is_model_object,
    live_source,
    live_tensors,
    recipe_of_tensor,
)
from diffc.models.sources.source import ModelSource
from diffc.progress import Reporter
from diffc.quantize.checkpoint import Checkpoint
from passes.weights.sources import memory_of_its_own

__all__ = ["LiveModel", "is_model_object", "read_live", "rest_of_pipeline", "unquantized_backbone"]
_FIRST = 64
"""Values of a tensor that tell it apart from others."""


@dataclass(frozen=True)
class LiveModel:
    """A model in memory, and the calibration that it has; None for one that is not quantized."""

    source: ModelSource
    checkpoint: Checkpoint | None


@contextmanager
def read_live(model: Any, ui: Reporter) -> Iterator[LiveModel]:
    """The model object as a source whose weights are recipes, while this is open; they are let go at its end.

    A model that mtq.quantize has calibrated brings its quantizers. Raises DiffcError and UnsupportedError as
    `live_source` does, and for quantizers of a kind that diffc does not compile.
    """
    with memory_of_its_own():
        with ui.stage("hash the weights in memory") as update:
            source = live_source(model, update)
        yield LiveModel(source, _calibration(model, source))


def _calibration(model: Any, source: ModelSource) -> Checkpoint | None:
    """The calibration of a backbone that was quantized with ModelOpt, None for one that was not."""
    backbone = backbone_in(model)
    if not any(name.endswith("_quantizer") for name, _ in backbone.named_modules()):
        return None
    import modelopt.torch.opt as mto

    state = backbone.state_dict()
    content = {"modelopt_state": mto.modelopt_state(backbone), "model_state_dict": state}
    own = (name for name, value in state.items() if name not in source.weights and torch.is_tensor(value))
    stored = {**source.weights, **{name: recipe_of_tensor(state[name]) for name in own}}
    with quiet_libraries(), torch.device("meta"):
        plain = build_backbone(source.family, source.config, torch.float32)
    name, family = source.name, source.family.name
    found = Checkpoint.from_modelopt_object(
        name, content, stored, plain, family=family, weights=source.weights
    )
    return found.of_source(source.fingerprint)


def rest_of_pipeline(source: ModelSource) -> str:
    """A hash of a pipeline in memory but for its backbone; empty for any other model.

    Cheap: of each tensor the shape and the first values; of what has no tensors, its config.
    """
    if source.pipeline is None:
        return ""
    digest = hashlib.sha256()
    for name, part in sorted(source.pipeline.components.items()):
        digest.update(f"{name} {type(part).__name__} {getattr(part, 'config', '')}\n".encode())
        if isinstance(part, nn.Module) and name != source.family.component:
            for key, tensor in part.state_dict().items():
                values = array_of(tensor.reshape(-1)[:_FIRST]).tobytes()
                digest.update(f"{key} {list(tensor.shape)}\n".encode() + values)
    return digest.hexdigest()


@contextmanager
def unquantized_backbone(source: ModelSource, *, shares: bool) -> Iterator[Any]:
    """The pipeline of a model in memory with a copy of its backbone, which may be changed; restored at the end.

    `shares`: the copy has the same weights, and who uses it must not write to them; otherwise weights of its own.
    Raises DiffcError for a pipeline whose components are offloaded.
    """
    pipe, component = source.pipeline, source.family.component
    hooked = [name for name, part in pipe.components.items() if hasattr(part, "_hf_hook")]
    if hooked:
        raise DiffcError(
            f"this {type(pipe).__name__} offloads its components ({', '.join(hooked)}), and calibration runs it whole",
            fix='call pipe.remove_all_hooks() and pipe.to("cuda"), or give format with from_checkpoint',
        )
    original, bar = getattr(pipe, component), getattr(pipe, "_progress_bar_config", None)
    setattr(pipe, component, _copy(source, backbone_in(pipe), shares=shares))
    try:
        yield pipe
    finally:
        setattr(pipe, component, original)
        pipe.set_progress_bar_config(**(bar or {}))


def _copy(source: ModelSource, backbone: nn.Module, *, shares: bool) -> nn.Module:
    """A backbone of diffusers' own class with the live tensors, or copies of them."""
    from accelerate import init_empty_weights

    tensors = live_tensors(backbone)
    device = next(iter(tensors.values())).device
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    with quiet_libraries(), init_empty_weights(include_buffers=False):
        copy = build_backbone(source.family, source.config, dtype)
    state = {name: tensor.detach() if shares else tensor.detach().clone() for name, tensor in tensors.items()}
    copy.load_state_dict(state, strict=False, assign=True)
    return copy.requires_grad_(False).to(device)
