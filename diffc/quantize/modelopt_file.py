"""Reads the `{backbone}.pt` that ModelOpt's `mto.save` writes, without running what a pickle could hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.errors import DiffcError, UnsupportedError
from diffc.quantize.convert import enabled_quantizers, insert_quantizers, weighted_layers
from diffc.quantize.formats import FORMATS
from diffc.quantize.state import Amax, Settings, settings_of, usable_amax

if TYPE_CHECKING:
    from torch import nn

_ATTENTION = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer", "bmm2_output_quantizer")


def read(path: Path, backbone: nn.Module) -> tuple[str, dict[str, Settings], dict[str, Amax], str]:
    """Format name, settings, amax (float32) and ModelOpt version of the file at `path`.

    `backbone` is the unquantized model that it is for; fake tensors do. Quantizers that ModelOpt's presets
    put on norms by accident, and its softmax quantizers, which its scaled_dot_product_attention never runs,
    are left out. Raises DiffcError when the file is missing, damaged, holds objects that `weights_only`
    refuses, or is of another model; UnsupportedError for quantizers of a kind that diffc does not compile.
    """
    content = _load(path)
    states, tensors = _quantizer_states(path, content), content["model_state_dict"]
    enabled = {name: state for name, state in states.items() if not state.get("_disabled", True)}
    _refuse_unsupported(path, enabled, tensors)
    layers = set(weighted_layers(backbone))
    weights = [name for name in enabled if name.endswith(".weight_quantizer")]
    _check_model(path, backbone, [name.rpartition(".")[0] for name in weights], layers, tensors)
    kept = [name for name in enabled if name.rpartition(".")[0] in layers]
    settings: dict[str, Settings] = {name: settings_of(enabled[name]) for name in kept}
    format = _format_of(path, settings)
    found = ((name, tensors.get(f"{name}._amax"), settings[name]["num_bits"]) for name in kept)
    amax = {name: usable_amax(name, value, bits).numpy() for name, value, bits in found}
    return format, settings, amax, str(content["modelopt_state"].get("modelopt_version"))


def _load(path: Path) -> dict[str, Any]:
    """The dict that `mto.save` wrote, its tensors mapped and not read."""
    import torch

    if not path.is_file():
        raise DiffcError(f"no such file: {path}", mend="give the .pt file that ModelOpt wrote")
    try:
        with torch.serialization.safe_globals([slice]):  # kept by block quantizers; ModelOpt allows it too
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DiffcError(
            f"{path} holds objects that could run code, and diffc does not load those: {error}",
            mend="save it again with ModelOpt's mto.save, or calibrate with diffc",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise DiffcError(
            f"{path} is damaged, or not a file of torch.save ({error})", mend="copy it again"
        ) from error
    if not isinstance(content, dict) or not {"modelopt_state", "model_state_dict"} <= content.keys():
        raise _not_mto(path)
    return content


def _not_mto(path: Path) -> DiffcError:
    return DiffcError(
        f"{path} is not a checkpoint of a model that ModelOpt quantized: expected the dict of mto.save with"
        " 'modelopt_state' and 'model_state_dict'",
        mend="give the .pt file that mto.save wrote",
    )


def _quantizer_states(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of every quantizer by module path, as the last mode that was applied left it."""
    try:
        modes = [mode["metadata"] for _, mode in content["modelopt_state"]["modelopt_state_dict"]]
    except (KeyError, TypeError, ValueError) as error:
        raise _not_mto(path) from error
    found = [mode["quantizer_state"] for mode in modes if "quantizer_state" in mode]
    if not found:
        raise _not_mto(path)
    return dict(found[-1])


def _refuse_unsupported(path: Path, enabled: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    for name, state in enabled.items():
        if name.endswith(_ATTENTION):
            raise UnsupportedError(
                f"{path} quantizes attention ({name}), which diffc does not compile yet",
                mend="quantize without --quantize-mha",
            )
        if f"{name}._pre_quant_scale" in tensors or not state.get("_fake_quant", True):
            raise UnsupportedError(
                f"{path}: {name} scales its input or holds compressed weights (SmoothQuant, AWQ, --compress),"
                " which diffc does not compile yet",
                mend="quantize with --quant-algo max and without --compress",
            )


def _check_model(
    path: Path, backbone: nn.Module, quantized: list[str], layers: set[str], tensors: Mapping[str, Any]
) -> None:
    """Raises DiffcError unless every quantized layer exists in `backbone` with a weight of the same shape."""
    if not quantized:
        raise DiffcError(f"{path} has no enabled weight quantizer", mend="quantize it, or use --format none")
    for name in quantized:
        here = backbone.get_parameter(f"{name}.weight").shape if name in layers else None
        there = tensors[f"{name}.weight"].shape if f"{name}.weight" in tensors else None
        if here is None or here != there:
            raise DiffcError(
                f"{path} is of another model: the weight of {name} is {there and list(there)} in it and"
                f" {here and list(here)} in this {type(backbone).__name__}",
                mend="give the checkpoint of this model",
            )


def _format_of(path: Path, settings: Mapping[str, Settings]) -> str:
    """The format whose preset sets quantizers just so. Raises UnsupportedError when there is none."""
    for fmt in FORMATS.values():
        if fmt.preset is not None:
            expected = _preset_settings(fmt.name)
            if all(value == expected.get(name.rpartition(".")[2]) for name, value in settings.items()):
                return fmt.name
    kinds = sorted({str(value) for value in settings.values()})
    raise UnsupportedError(
        f"{path}: no format of diffc has quantizers like {'; '.join(kinds)}",
        mend=f"quantize with the preset of one of: {', '.join(FORMATS)}",
    )


def _preset_settings(format: str) -> dict[str, Settings]:
    """What a format's preset gives the quantizers of a layer, by their name in it."""
    from torch import nn

    layer = nn.Sequential(nn.Linear(1, 1))
    insert_quantizers(layer, FORMATS[format], r"$^")
    quantizers = enabled_quantizers(layer)
    return {name.rpartition(".")[2]: settings_of(q.get_modelopt_state()) for name, q in quantizers.items()}
