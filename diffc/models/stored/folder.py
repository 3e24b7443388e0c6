"""A backbone folder that ModelOpt has quantized: its export, or save_pretrained after mtq.quantize or mtq.compress."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.misfit import quantized_config
from diffc.models.stored.decode import SUFFIXES, Statement, decode
from diffc.models.stored.held import Decoded
from passes.weights.recipe import Recipe

STATE = "modelopt_state.pth"
ENTRY = "quantization_config"
_BITS = {"FP8": (4, 3), "INT8": 8}


def is_quantized(config: Mapping[str, Any], weights: Mapping[str, Recipe]) -> bool:
    """Whether ModelOpt quantized the folder, by its config.json or by the names of its tensors."""
    return bool(config.get(ENTRY)) or any(name.endswith(tuple(f".{s}" for s in SUFFIXES)) for name in weights)


def decode_folder(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Recipe]) -> Decoded:
    """The weights of the folder, and its layers as it holds them.

    Raises DiffcError for a folder that another library quantized, or whose state holds objects that could run code.
    """
    said: Any = config.get(ENTRY) or {}
    error = quantized_config(config, folder / "config.json")
    if error and (not isinstance(said, dict) or said.get("quant_method") != "modelopt"):
        raise error
    algorithm = str(said.get("quant_algo", ""))
    layers = _bits(folder, weights, str(said.get("quant_type", "")))
    found = decode(weights, Statement(algorithm, layers, comfyui=False), folder)
    if error and not found.held:  # it says so, and no tensor has a scale
        raise error
    return found


def _bits(folder: Path, weights: Mapping[str, Recipe], kind: str) -> dict[str, Mapping[str, Any]]:
    """The bits of each layer's weight where only ranges are stored: from ModelOpt's state, or its config."""
    suffix = ".weight_quantizer._amax"
    layers = [name.removesuffix(suffix) for name in weights if name.endswith(suffix)]
    if not layers:
        return {}
    known = _state(folder / STATE) if (folder / STATE).is_file() else {}
    told = {name: known.get(f"{name}.weight_quantizer", _BITS.get(kind)) for name in layers}
    return {name: {"num_bits": bits} for name, bits in told.items() if bits is not None}


def _state(path: Path) -> dict[str, Any]:
    """The bits of every quantizer in a `modelopt_state.pth`; nothing of it is run."""
    import torch

    try:
        with torch.serialization.safe_globals([slice]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        modes = [mode["metadata"] for _, mode in content["modelopt_state_dict"]]
        states = [mode["quantizer_state"] for mode in modes if "quantizer_state" in mode][-1]
        return {name: state["_num_bits"] for name, state in states.items() if "_num_bits" in state}
    except Exception as error:  # torch's unpickler raises whatever a damaged byte leads it to
        raise DiffcError(
            f"{path} is not ModelOpt's state, or holds objects that could run code: {error}",
            fix="save the folder again with ModelOpt",
        ) from error
