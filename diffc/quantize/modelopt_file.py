"""Reads the `{backbone}.pt` that ModelOpt's `mto.save` writes, without running what a pickle could hold."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from onnx import TensorProto

from diffc.errors import DiffcError, UnsupportedError
from diffc.quantize.attention import attention_layers
from diffc.quantize.convert import (
    enabled_quantizers,
    insert_quantizers,
    layer_of,
    role_of,
    weighted_layers,
)
from diffc.quantize.formats import FORMATS, Format
from diffc.quantize.kinds import Settings, block_size_of, kind_of
from diffc.quantize.schema import Quantizer
from diffc.quantize.sound import check_settings, check_values
from diffc.quantize.state import (
    SCALING,
    Amax,
    Scaling,
    settings_of,
    usable_amax,
)
from diffc.quantize.trained import changed_weights, nearly_equal
from diffc.records import check_record
from passes.weights.recipe import Recipe
from passes.weights.torch_files import torch_tensors

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Found:
    """The content of a file of ModelOpt: the fields of `Checkpoint` of these names, and ModelOpt's version."""

    format: str
    settings: dict[str, Settings]
    amax: dict[str, Amax]
    scaling: Scaling
    version: str
    weights: dict[str, Recipe]


def read(path: Path, backbone: nn.Module, weights: Mapping[str, Recipe]) -> Found:
    """The quantizers in the file at `path`, and the weights in it that are not equal to `weights`, the model's own.

    `backbone` is the unquantized model that it is for; fake tensors do. The weight of a layer with channel factors or
    a low-rank branch is the file's own in any case: ModelOpt stores it after both, and it may have been trained.
    Quantizers that ModelOpt's presets
    put on norms by accident, and its softmax quantizers, which its scaled_dot_product_attention never runs,
    are left out. Raises DiffcError when the file is missing, damaged, holds objects that `weights_only`
    refuses, or is of another model; UnsupportedError for quantizers of a kind that diffc does not compile.
    """
    content, prefix = _load(path), "model_state_dict."
    tensors = {name: recipe for name, recipe in torch_tensors(path).items() if name.startswith(prefix)}
    stored = {name.removeprefix(prefix): recipe for name, recipe in tensors.items()}
    return found_in(str(path), content, stored, backbone, weights)


def found_in(
    path: str,
    content: Mapping[str, Any],
    stored: Mapping[str, Recipe],
    backbone: nn.Module,
    weights: Mapping[str, Recipe],
) -> Found:
    """The same for the dict that `mto.save` writes, its tensors `stored` as recipes; `path` is for messages."""
    states, tensors = _quantizer_states(path, content), content["model_state_dict"]
    enabled = {name: state for name, state in states.items() if not state.get("_disabled", True)}
    enabled = {name: state for name, state in enabled.items() if "_num_bits" in state}  # not the sequences
    _refuse_unsupported(path, enabled)
    layers = set(weighted_layers(backbone))
    quantized = [layer_of(name) for name in enabled if role_of(name) == "weight_quantizer"]
    _check_model(path, backbone, list(dict.fromkeys(quantized)), layers, tensors)
    attention = set(attention_layers(backbone))
    kept = [name for name in enabled if _is_used(name, layers, attention)]
    settings: dict[str, Settings] = {name: _settings(path, name, enabled[name]) for name in kept}
    check_settings(path, settings)
    _check_blocks(path, backbone, settings)
    format = _format_of(path, settings, tensors)
    scaling = _scaling(kept, {key: _numbers(path, key, tensors) for key in tensors if key.endswith(_SCALED)})
    amax = {
        name: usable_amax(name, _numbers(path, f"{name}._amax", tensors), kind).numpy()
        for name in kept
        if (kind := kind_of(settings[name])).has_amax
    }
    check_values(path, amax, scaling)
    version = str(content["modelopt_state"].get("modelopt_version"))
    carried = _weights(
        path, stored, backbone, weights, {layer_of(name.rpartition(".")[0]) for name in scaling}
    )
    return Found(format, settings, amax, scaling, version, carried)


def _settings(path: str, name: str, state: Mapping[str, Any]) -> Settings:
    """The settings in a quantizer's state. Raises DiffcError where it lacks one, or has one of another type."""
    try:
        found = settings_of(state)
        check_record(
            {"settings": {name: found}}, path, _Quantizers, fix="save it again with ModelOpt's mto.save"
        )
        return found
    except (KeyError, TypeError, ValueError) as error:
        raise DiffcError(
            f"{path} is damaged: the state of {name} lacks {error}",
            fix="save it again with ModelOpt's mto.save",
        ) from error


def _numbers(path: str, name: str, tensors: Mapping[str, Any]) -> Any:
    """A tensor of floats by its name; None where there is none."""
    import torch

    value = tensors.get(name)
    if value is not None and not (
        isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel()
    ):
        raise DiffcError(f"{path} is damaged: {name} is not a tensor of floats", fix="copy it again")
    return value


_SCALED = tuple(f"._{kind}" for kind in SCALING)


class _Quantizers(Struct):
    settings: dict[str, Quantizer]


def _weights(
    path: str,
    stored: Mapping[str, Recipe],
    backbone: nn.Module,
    own: Mapping[str, Recipe],
    scaled: set[str],
) -> dict[str, Recipe]:
    """The backbone's tensors in `stored` that are not equal to the model's `own`; values stay in the file.

    `scaled` are the layers whose channel factors or branches diffc applies.
    """
    wanted = set(backbone.state_dict())
    theirs = {name: recipe for name, recipe in stored.items() if name in wanted}
    plain = {name: recipe for name, recipe in own.items() if name.rpartition(".")[0] not in scaled}
    for name in list(theirs):
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer not in scaled and (whole := _unscaled(layer, stored)) is not None:
            if name in plain and nearly_equal(whole, plain.pop(name)):
                del theirs[name]
            else:
                theirs[name] = whole
    return changed_weights(theirs, plain, path)


def _unscaled(layer: str, stored: Mapping[str, Recipe]) -> Recipe | None:
    """The weight of a layer with its channel factors and its branch taken back; None where it has neither.

    ModelOpt's scripts calibrate every layer and then switch the quantizers of some off. Such a layer still multiplies
    its input by the factors and adds the branch, which in diffc it does not: (W + B A) * factor is the same.
    """
    weight, branch = stored[f"{layer}.weight"], f"{layer}.weight_quantizer._svdquant_lora_"
    factor = stored.get(f"{layer}.input_quantizer._pre_quant_scale")
    if factor is None and f"{branch}a" not in stored:
        return None
    if f"{branch}a" in stored:
        minus = Recipe.of_array(np.float32(-1).reshape(1, 1))
        outer = stored[f"{branch}b"].cast(TensorProto.FLOAT).multiply(minus)
        weight = weight.subtract_product(outer, stored[f"{branch}a"].cast(TensorProto.FLOAT))
    return (
        weight
        if factor is None
        else weight.multiply(factor.cast(TensorProto.FLOAT).reshape((1, *factor.shape)))
    )


def _is_used(name: str, layers: set[str], attention: set[str]) -> bool:
    """Whether a quantizer runs in the model: on a layer, or on q, k, v or the output of an attention."""
    if layer_of(name) in layers:
        return True
    return layer_of(name) in attention and role_of(name) != "softmax_quantizer"


def _scaling(names: Sequence[str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Channel factors and low-rank branches, as float32."""
    owners = dict.fromkeys(re.sub(r"\.\d+$", "", name) for name in names)
    owners |= dict.fromkeys(f"{layer_of(name)}.input_quantizer" for name in names)
    keys = ((f"{owner}.{kind}", f"{owner}._{kind}") for owner in owners for kind in SCALING)
    return {name: tensors[key].float().numpy() for name, key in keys if key in tensors}


def _load(path: Path) -> dict[str, Any]:
    """The dict that `mto.save` wrote, its tensors mapped and not read."""
    import torch

    if not path.is_file():
        raise DiffcError(f"no such file: {path}", fix="give the .pt file that ModelOpt wrote")
    try:
        with torch.serialization.safe_globals(
            [slice]
        ):  # block quantizers hold slices; ModelOpt allows them as well
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DiffcError(
            f"{path} holds objects that could run code, and diffc does not load those: {error}",
            fix="save it again with ModelOpt's mto.save, or calibrate with diffc",
        ) from error
    except Exception as error:  # torch's unpickler raises whatever a damaged byte leads it to
        raise DiffcError(
            f"{path} is damaged, or not a file of torch.save ({type(error).__name__}: {str(error)[:300]})",
            fix="copy it again",
        ) from error
    if not isinstance(content, dict) or not {"modelopt_state", "model_state_dict"} <= content.keys():
        raise _not_mto(str(path))
    tensors = content["model_state_dict"]
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise _not_mto(str(path))
    return content


def _not_mto(path: str) -> DiffcError:
    return DiffcError(
        f"{path} is not a checkpoint of a model that ModelOpt quantized: expected the dict of mto.save with"
        " 'modelopt_state' and 'model_state_dict'",
        fix="give the .pt file that mto.save wrote",
    )


def _quantizer_states(path: str, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of every quantizer by module path, as the last mode that was applied left it."""
    try:
        modes = [mode["metadata"] for _, mode in content["modelopt_state"]["modelopt_state_dict"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_mto(path) from error
    found = [
        mode["quantizer_state"] for mode in modes if isinstance(mode, Mapping) and "quantizer_state" in mode
    ]
    if not found or not isinstance(found[-1], Mapping):
        raise _not_mto(path)
    states = dict(found[-1])
    if not all(isinstance(k, str) and isinstance(v, Mapping) for k, v in states.items()):
        raise _not_mto(path)
    return states


def _refuse_unsupported(path: str, enabled: Mapping[str, Any]) -> None:
    for name, state in enabled.items():
        if not state.get("_fake_quant", True):
            raise UnsupportedError(
                f"{path}: {name} holds compressed weights (--compress), whose originals are gone",
                fix="quantize without --compress; diffc compresses the weights itself",
            )


def _check_model(
    path: str, backbone: nn.Module, quantized: list[str], layers: set[str], tensors: Mapping[str, Any]
) -> None:
    """Raises DiffcError unless every quantized layer exists in `backbone` with a weight of the same shape."""
    if not quantized:
        raise DiffcError(f"{path} has no enabled weight quantizer", fix="quantize it, or use --format none")
    for name in quantized:
        here = backbone.get_parameter(f"{name}.weight").shape if name in layers else None
        there = getattr(
            tensors.get(f"{name}.weight"), "shape", None
        )  # a file can hold anything under that name
        if here is None or here != there:
            raise DiffcError(
                f"{path} is of another model: the weight of {name} is {there and list(there)} in it and"
                f" {here and list(here)} in this {type(backbone).__name__}",
                fix="give the checkpoint of this model",
            )


def _check_blocks(path: str, backbone: nn.Module, settings: Mapping[str, Settings]) -> None:
    """Raises UnsupportedError for a weight that is not whole blocks: ModelOpt pads it, which no kernel does."""
    for name, value in settings.items():
        size = block_size_of(value)
        if size is None or role_of(name) != "weight_quantizer":
            continue
        shape = list(backbone.get_parameter(f"{layer_of(name)}.weight").shape)
        if len(shape) != 2 or shape[-1] % size:
            raise UnsupportedError(
                f"{path}: the weight of {layer_of(name)} {shape} is not whole blocks of {size}",
                fix="quantize again with this layer disabled (mtq.disable_quantizer), or calibrate with diffc",
            )


def _format_of(path: str, settings: Mapping[str, Settings], tensors: Mapping[str, Any]) -> str:
    """The format whose quantizers have these settings. Raises UnsupportedError when there is none."""
    own = {name: value for name, value in settings.items() if not role_of(name).endswith(_ATTENTION)}
    scaled = any(name.endswith("._pre_quant_scale") for name in tensors)
    branched = any(name.endswith("._svdquant_lora_a") for name in tensors)
    for fmt in FORMATS.values():
        if fmt.quantizes and (fmt.algorithm == "svdquant") == branched and _scales(fmt) == scaled:
            expected = settings_of_format(fmt.name)
            if all(value == expected.get(_in_layer(name)) for name, value in own.items()):
                return fmt.name
    kinds = sorted({str(value) for value in own.values()})
    raise UnsupportedError(
        f"{path}: no format of diffc has quantizers like {'; '.join(kinds)}",
        fix=f"quantize with the settings of one of: {', '.join(FORMATS)}",
    )


_ATTENTION = ("bmm_quantizer", "bmm2_output_quantizer")


def _scales(fmt: Format) -> bool:
    return fmt.algorithm in ("smoothquant", "awq_lite", "svdquant")


def _in_layer(name: str) -> str:
    """The name of a quantizer within its layer: `a.b.weight_quantizer.0` -> `weight_quantizer.0`."""
    return name.removeprefix(layer_of(name)).lstrip(".")


def settings_of_format(format: str) -> dict[str, Settings]:
    """What a format gives the quantizers of a layer, by their name in it."""
    from torch import nn

    size = FORMATS[format].block_size or 1
    layer = nn.Sequential(nn.Linear(size, 1))
    insert_quantizers(layer, FORMATS[format], r"$^")
    quantizers = enabled_quantizers(layer)
    return {_in_layer(name): settings_of(q.get_modelopt_state()) for name, q in quantizers.items()}
