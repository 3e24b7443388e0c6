"""The safetensors files of a backbone folder: which ones to take, whether they are whole, and a recipe per tensor.

Only names, JSON and headers are read: a damaged download is an error within a second, not after an hour of
calibration.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffc.errors import DiffcError
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import read_json
from diffc.models.sources.weight_names import choose
from diffc.records import of_pass_error
from passes.base import PassError
from passes.files.bounded import regular
from passes.weights.recipe import Recipe
from passes.weights.sources import MAX_HEADER, safetensors_tensors

_EXPECTED = "diffusion_pytorch_model.safetensors, or its index diffusion_pytorch_model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_LFS_POINTER = b"version "
"""The first bytes of a Git LFS pointer; read as the length of a safetensors header they are 2 exabytes."""


def folder_weights(folder: Path, variant: str | None = None) -> dict[str, Recipe]:
    """A recipe for every tensor of a backbone folder, from an index or a single file, all headers checked.

    The files of `variant` are taken where there are any, the plain ones otherwise. Raises DiffcError when there is no
    file, when several could be meant, and when one is damaged.
    """
    path = _weights_file(folder, variant)
    if path.suffix == ".json":
        return _sharded(path)
    weights = file_weights(path)
    if not weights:
        raise DiffcError(f"{path} holds no tensors", fix="download the model again")
    return weights


def file_weights(path: Path) -> dict[str, Recipe]:
    """A recipe for every tensor of a safetensors file, in the order of its header.

    Raises DiffcError when the file is a Git LFS pointer, not as long as its header says, or damaged.
    """
    inside(path.parent, path.name)
    try:
        actual = regular(path).st_size
    except PassError as error:
        raise of_pass_error(error, "name a .safetensors file") from error
    _check_length(path, actual, _header_end(path, actual), more=True)
    try:
        weights = safetensors_tensors(path)
    except PassError as error:
        raise of_pass_error(error, "download the file again") from error
    ends = (recipe.source.offset + recipe.source.length for recipe in weights.values())
    _check_length(path, actual, max(ends, default=_header_end(path, actual)), more=False)
    try:
        with safe_open(path, framework="numpy"):  # checks that shapes, types and offsets agree
            return weights
    except SafetensorError as error:
        raise DiffcError(f"{path} is damaged: {error}", fix="download the file again") from error


def _header_end(path: Path, actual: int) -> int:
    """Bytes of the header and the length before it (https://huggingface.co/docs/safetensors/index#format)."""
    with path.open("rb") as file:
        start = file.read(8)
    if start == _LFS_POINTER:
        raise DiffcError(f"{path} is a Git LFS pointer, not the weights", fix="run `git lfs pull` there")
    if actual < 8:
        return 8
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise DiffcError(f"{path} is not a safetensors file", fix="download the file again")
    return 8 + length


def _check_length(path: Path, actual: int, expected: int, *, more: bool) -> None:
    """Raise DiffcError unless a file has the `expected` bytes, or, with `more`, at least as many."""
    if actual < expected or (actual > expected and not more):
        damage = "is truncated" if actual < expected else "is damaged"
        raise DiffcError(
            f"{path} {damage}: {actual} bytes, expected {expected}", fix="download the file again"
        )


def file_names(folder: Path) -> list[str]:
    """The names of the files in a folder, sorted; none for a folder that does not exist."""
    return sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []


def _weights_file(folder: Path, variant: str | None) -> Path:
    """The index or the single safetensors file to read. Raises DiffcError when there is none, or several."""
    if chosen := choose(file_names(folder), variant):
        return folder / chosen.name
    found = sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and "-of-" not in found[0].name:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise DiffcError(
            f"{folder}: several files could be the weights: {names}; expected {_EXPECTED}",
            fix="keep one set of weights; shards need their index.json",
        )
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> DiffcError:
    """The error for a folder without safetensors: pickled weights only, or none at all."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
    if not pickled:
        return DiffcError(
            f"folder without weights: {folder} has a config.json and no *.safetensors",
            fix="download the model completely (weights are large files that a plain git clone leaves out)",
        )
    kind = read_json(folder / "config.json")["_class_name"]
    convert = f"from diffusers import {kind} as M; M.from_pretrained('.').save_pretrained('.')"
    return DiffcError(
        f"{folder} has pickled weights only ({pickled[0]}); diffc reads safetensors",
        fix=f'convert it, if you trust its origin (pickles run code): in that folder, python -c "{convert}"',
    )


def _sharded(index: Path) -> dict[str, Recipe]:
    """A recipe for every tensor of an index, each file's header checked against it."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, str) for v in entries.values()):
        raise DiffcError(f"{index} has no weight_map of tensor names to files", fix="download it again")
    shards = {name: inside(index.parent, name) for name in sorted(set(entries.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise DiffcError(
            f"{index.name} names files that {index.parent} does not have: {', '.join(missing)}",
            fix="download the model completely",
        )
    present = {name: file_weights(path) for name, path in shards.items()}
    for key, name in entries.items():
        if key not in present[name]:
            raise DiffcError(
                f"{index.name} says that {shards[name]} holds {key!r}, which it does not",
                fix="download index and shards again, of the same release",
            )
    return {key: present[name][key] for key, name in entries.items()}
