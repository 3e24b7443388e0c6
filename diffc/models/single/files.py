"""The tensors of one file, whatever wrote it: safetensors, GGUF, or a pickle of tensors, of which no code runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.models.single.gguf import gguf_tensors
from diffc.models.sources.safetensors_files import file_weights
from diffc.models.stored.decode import Statement
from passes.base import PassError
from passes.files.bounded import parse_object
from passes.weights.recipe import Recipe
from passes.weights.sources import safetensors_metadata
from passes.weights.torch_files import torch_tensors

SUFFIXES = (".safetensors", ".sft", ".gguf", ".ckpt")
_LAYERS = "_quantization_metadata"


@dataclass(frozen=True)
class File:
    """`tensors` by the names in the file; `metadata` is the text beside them (a safetensors header, keys of GGUF).

    `quantized` names the block types of a GGUF file's tensors.
    """

    path: Path
    tensors: Mapping[str, Recipe]
    metadata: Mapping[str, str] = field(default_factory=dict)
    quantized: Mapping[str, str] = field(default_factory=dict)


def read_file(path: Path) -> File:
    """The tensors of a file; its header alone is read. Raises DiffcError when it is damaged or of another kind."""
    if path.suffix == ".gguf":
        try:
            tensors, metadata, quantized = gguf_tensors(path)
        except PassError as error:
            raise DiffcError(str(error), fix="download the file again") from error
        return File(path, tensors, metadata, quantized)
    if path.suffix == ".ckpt":
        return File(path, _pickled(path))
    tensors = file_weights(path)
    if not tensors:
        raise DiffcError(f"{path} holds no tensors", fix="download the model again")
    return File(path, tensors, header_metadata(path))


def _pickled(path: Path) -> dict[str, Recipe]:
    try:
        found = torch_tensors(path)
    except PassError as error:
        raise DiffcError(str(error), fix="give a .safetensors file of the model") from error
    return {name.removeprefix("state_dict."): recipe for name, recipe in found.items()}


def header_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file that was checked before."""
    return safetensors_metadata(path)


def statement_of(metadata: Mapping[str, str]) -> Statement:
    """What a file's metadata say of its quantization. Names of layers say nothing: either layout has either names."""
    layers = _json(metadata.get(_LAYERS, "")).get("layers", {})
    if layers or "comfy" in metadata.get("format", ""):
        return Statement(layers={str(k): v for k, v in layers.items() if isinstance(v, dict)}, comfyui=True)
    said = _json(metadata.get("quantization_config", ""))
    if said.get("quant_method") == "modelopt":
        return Statement(str(said.get("quant_algo", "")), comfyui=False)
    return Statement()


def _json(text: str) -> dict[str, Any]:
    try:
        return parse_object(text, "the metadata") if text else {}
    except PassError:  # a text of somebody else's
        return {}
