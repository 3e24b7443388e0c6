"""The layouts of `diffc checkpoint export`, one function each: which files, which tensors, and what cannot be said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffc.commands.export.layers import DTYPES, calibrated_layers, plain_tensors, unsaid
from diffc.commands.export.tensors import comfyui_tensors, modelopt_tensors
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.single.original import has_way_back, original_names
from diffc.models.sources.backbone import load_backbone, quiet_libraries
from diffc.models.sources.source import ModelSource
from diffc.models.stored.held import Held
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.modelopt_state import record_quantize_mode
from diffc.version import VERSION
from passes.graph.trt_ops import FOUR_OVER_SIX
from passes.weights.evaluate import evaluate
from passes.weights.moves import joined, part, split_at_dequantize
from passes.weights.recipe import Recipe
from passes.weights.safetensors_writer import write_safetensors

FILE = "diffusion_pytorch_model.safetensors"
_ALGORITHMS = {
    "fp8": "FP8",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int8_smoothquant": "W8A8_SQ_PER_CHANNEL",
    "int4_awq": "W4A16_AWQ",
    "w4a8_awq": "W4A8_AWQ",
    "nvfp4": "NVFP4",
    "nvfp4_svdquant": "NVFP4_SVD",
    "mxfp8": "MXFP8",
}
_KINDS = {
    "fp8": "FP8",
    "int8": "W8A8_SQ_PER_CHANNEL",
    "int4": "W4A16_AWQ",
    "nvfp4": "NVFP4",
    "mxfp8": "MXFP8",
}


@dataclass(frozen=True)
class Calibrated:
    """A model with its calibration, in the type `dtype`."""

    source: ModelSource
    checkpoint: Checkpoint
    dtype: str


@dataclass(frozen=True)
class Written:
    """What was written: layers whose codes are in it, and what the layout could not say, by the reason."""

    layers: int
    left_out: Mapping[str, list[str]] = field(default_factory=dict)


def write_modelopt(model: Calibrated, place: Path) -> Written:
    """ModelOpt's `export_hf_checkpoint`: config.json with quantization_config, and one safetensors file."""
    held, left = _linear(model, "convolutions, which ModelOpt's exports have in full precision")
    dtype = DTYPES[model.dtype]
    tensors = plain_tensors(model.source, model.checkpoint, held, model.dtype)
    for name, layer in held.items():
        tensors |= modelopt_tensors(name, layer, dtype)
    _write_folder(
        place, tensors, _config(model) | {"quantization_config": _quantization(model, held, tensors)}
    )
    return Written(len(held), left)


def _linear(model: Calibrated, why: str) -> tuple[dict[str, Held], dict[str, list[str]]]:
    """The linear layers, and what is left out: attention, and convolutions because of `why`."""
    held = calibrated_layers(model.source, model.checkpoint, model.dtype)
    convolutions = [name for name, layer in held.items() if len(layer.weight.shape) != 2]
    attention = unsaid(model.checkpoint)
    left = {why: convolutions, "attention in FP8, for which there is no place": attention}
    return {n: h for n, h in held.items() if n not in convolutions}, {k: v for k, v in left.items() if v}


def _quantization(
    model: Calibrated, held: Mapping[str, Held], tensors: Mapping[str, Recipe]
) -> dict[str, Any]:
    kinds = sorted({layer.kind for layer in held.values()})
    algorithm = _ALGORITHMS.get(model.checkpoint.format) or (_KINDS[kinds[0]] if len(kinds) == 1 else "MIXED")
    plain = {
        key.removesuffix(".weight")
        for key, r in tensors.items()
        if key.endswith(".weight") and len(r.shape) == 2
    }
    said: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": algorithm}
    said |= {"ignore": sorted(plain - held.keys()), "producer": {"name": "diffc", "version": VERSION}}
    if bits := {"FP8": 8, "NVFP4": 4}.get(algorithm):
        group = {"dynamic": False, "num_bits": bits, "type": "float"} | (
            {"group_size": 16} if bits == 4 else {}
        )
        said["config_groups"] = {
            "group_0": {"input_activations": group, "weights": group, "targets": ["Linear"]}
        }
    return said


def write_diffusers(model: Calibrated, place: Path) -> Written:
    """A folder that `from_pretrained` of diffusers loads: in 16 bits, the values that the codes stand for."""
    held = calibrated_layers(model.source, model.checkpoint, model.dtype)
    dtype = DTYPES[model.dtype]
    tensors = plain_tensors(model.source, model.checkpoint, held, model.dtype)
    tensors |= {f"{name}.weight": layer.effective.cast(dtype) for name, layer in held.items()}
    _write_folder(place, tensors, _config(model))
    inputs = [name for name, layer in held.items() if layer.input is not None]
    left = {"quantized inputs, which diffusers does not compute": inputs}
    return Written(len(held), {k: v for k, v in left.items() if v})


def write_mto(model: Calibrated, place: Path) -> Written:
    """A file of ModelOpt's `mto.save`, which `mto.restore` takes: a pickle; the whole model is in memory."""
    import modelopt.torch.opt as mto
    import torch

    if not model.checkpoint.scales_weights:
        raise UnsupportedError(
            "mto.save keeps quantizers beside unquantized weights, and this model's own codes are all there is",
            fix="give --layout modelopt-hf or comfyui",
        )
    if any((own["block_sizes"] or {}).get(FOUR_OVER_SIX) for own in model.checkpoint.settings.values()):
        raise UnsupportedError(
            "the weights have --weight-scales four-six, which ModelOpt's quantizers find in another way",
            fix="give --layout modelopt-hf or comfyui, which hold codes",
        )
    with quiet_libraries():
        backbone = load_backbone(model.source, getattr(torch, model.dtype))
        model.checkpoint.apply(backbone, model.source.family.name)
        record_quantize_mode(backbone)
        mto.save(backbone, place)
    return Written(len(calibrated_layers(model.source, model.checkpoint, model.dtype)))


def write_comfyui(model: Calibrated, place: Path) -> Written:
    """One file by the names of the original release, with ComfyUI's `comfy_quant` beside every quantized layer."""
    kind = model.source.family.backbone_class
    if not has_way_back(kind):
        raise UnsupportedError(
            f"the names that ComfyUI has for a {kind} are not known here", fix="give --layout modelopt-hf"
        )
    held = calibrated_layers(model.source, model.checkpoint, model.dtype)
    plain = plain_tensors(model.source, model.checkpoint, held, model.dtype)
    table = original_names(kind, {*plain, *(f"{name}.weight" for name in held)})
    assert table is not None
    tensors, expanded, count = dict[str, Recipe](), list[str](), 0
    for target, made in table.items():
        layers = [held.get(name.removesuffix(".weight")) for name in made.parts]
        whole = _joined(layers) if target.endswith(".weight") and not made.swapped else None
        found = None if whole is None else comfyui_tensors(target.removesuffix(".weight"), whole)
        if found is not None:
            tensors, count = tensors | found, count + 1
            continue
        expanded += [target] if any(layer is not None for layer in layers) else []
        dtype = DTYPES[model.dtype]
        values = [
            plain[name] if layer is None else layer.effective.cast(dtype)
            for name, layer in zip(made.parts, layers, strict=True)
        ]
        tensors[target] = _swapped(joined(values)) if made.swapped else joined(values)
    prefixed = {f"model.diffusion_model.{name}": recipe for name, recipe in tensors.items()}
    _write_file(place, prefixed, {"format": "comfyui"})
    left = {"written in 16 bits (joined layers of different scales, or codes that ComfyUI lacks)": expanded}
    left |= {"attention in FP8, for which there is no place": unsaid(model.checkpoint)}
    return Written(count, {k: v for k, v in left.items() if v})


def _joined(layers: list[Held | None]) -> Held | None:
    """One layer of the rows of several; None where its codes, or their inputs, are not of one scale."""
    found = [layer for layer in layers if layer is not None]
    if not found or len(found) != len(layers):
        return None
    if len(found) == 1:
        return found[0]
    if len({layer.kind for layer in found}) > 1 or len({_input_key(layer) for layer in found}) > 1:
        return None
    try:
        weight = joined([layer.weight for layer in found])
    except ValueError:
        return None
    split = split_at_dequantize(weight)
    alone = split is not None and not split[2]
    return replace(found[0], weight=weight) if alone and found[0].low_rank is None else None


def _input_key(layer: Held) -> tuple[Any, ...]:
    scale = (
        None if layer.input is None or layer.input.scale is None else evaluate(layer.input.scale).tobytes()
    )
    factor = None if layer.pre_quant_scale is None else evaluate(layer.pre_quant_scale).tobytes()
    return (None if layer.input is None else layer.input.kind, scale, factor)


def _swapped(recipe: Recipe) -> Recipe:
    half = recipe.shape[0] // 2
    return joined([part(recipe, 0, half, 2 * half), part(recipe, 0, 0, half)])


def _config(model: Calibrated) -> dict[str, Any]:
    return dict(model.source.config)


def _write_folder(place: Path, tensors: Mapping[str, Recipe], config: Mapping[str, Any]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    (place / "config.json").write_text(text, encoding="utf-8", newline="\n")
    _write_file(place / FILE, tensors, {"format": "pt"})


def _write_file(place: Path, tensors: Mapping[str, Recipe], metadata: Mapping[str, str]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_safetensors(place, tensors, metadata)
    except OSError as error:
        raise DiffcError(f"cannot write {place}: {error}", fix="name another place with -o") from error


@dataclass(frozen=True)
class Layout:
    """How a calibration is written: `suffix` is that of a single file, empty for a folder."""

    summary: str
    suffix: str
    write: Callable[[Calibrated, Path], Written]


LAYOUTS: Mapping[str, Layout] = {
    "modelopt-hf": Layout("a folder as ModelOpt's export_hf_checkpoint writes it", "", write_modelopt),
    "diffusers": Layout("a folder that diffusers loads: the codes' values in 16 bits", "", write_diffusers),
    "mto": Layout(
        "a .pt file for ModelOpt's mto.restore (a pickle; needs the memory of the model)", ".pt", write_mto
    ),
    "comfyui": Layout("a .safetensors file by the names that ComfyUI reads", ".safetensors", write_comfyui),
}
