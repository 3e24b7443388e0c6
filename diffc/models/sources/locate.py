"""Finds the backbone that MODEL of the command line means, and checks its files before anything heavy starts.

Only names, JSON and safetensors headers are read: a damaged download is an error within a second, not after
an hour of calibration. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffc.errors import DiffcError, UnsupportedError
from diffc.models.embedded.catalogue import EMBEDDED, materialize

FAMILIES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux", "UNet2DConditionModel": "sdxl"}
COMPONENTS = ("transformer", "unet")
WEIGHTS = "diffusion_pytorch_model"
# What diffusers writes, in the order in which we take it: full weights before a variant, index before file.
NAMES = (
    f"{WEIGHTS}.safetensors.index.json",
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}.safetensors.index.fp16.json",
    f"{WEIGHTS}.fp16.safetensors.index.json",
    f"{WEIGHTS}.fp16.safetensors",
)
MAX_HEADER = 100_000_000  # bytes, the format's own limit
ACCEPTED = "a diffusers pipeline folder (model_index.json), a backbone folder (config.json, safetensors)"


@dataclass(frozen=True)
class ModelSource:
    """A backbone on disk, checked: its config.json and, for every tensor, the safetensors file that holds it.

    `pipeline_dir` is None for a bare backbone folder; `family` is "sd3", "flux" or "sdxl".
    """

    name: str
    pipeline_dir: Path | None
    backbone_dir: Path
    config: Mapping[str, Any]
    weights: Mapping[str, Path]
    family: str


def locate(model: str) -> ModelSource:
    """The backbone that `model` names: an embedded model, a pipeline folder or a backbone folder.

    Raises UnsupportedError for a class of backbone that diffc does not know, DiffcError for everything else
    that keeps the model from being read: unknown name, missing, truncated or pickled weights, bad JSON.
    """
    if model in EMBEDDED:
        folder = materialize(model)
        return _source(model, folder, folder / EMBEDDED[model].component)
    folder = Path(model).expanduser().absolute()
    if not folder.is_dir():
        raise _not_a_model(f"unknown model {model!r}: it is no embedded model and no folder")
    if (folder / "model_index.json").is_file():
        return _source(folder.name, folder, _component(folder))
    if (folder / "config.json").is_file():
        return _source(folder.name, None, folder)
    raise _not_a_model(f"{folder} has neither model_index.json nor config.json")


def _not_a_model(what: str) -> DiffcError:
    """The error that lists everything that MODEL can be."""
    return DiffcError(
        f"{what}. Expected {ACCEPTED}, or an embedded model: {', '.join(EMBEDDED)}", fix="give one of these"
    )


def _component(pipeline: Path) -> Path:
    """The backbone folder of a pipeline folder."""
    index = _read_json(pipeline / "model_index.json")
    named = [c for c in COMPONENTS if isinstance(index.get(c), list) and all(index[c])]
    if not named:
        kind = index.get("_class_name", "pipeline")
        raise UnsupportedError(f"{pipeline}: this {kind} has none of the components {', '.join(COMPONENTS)}")
    folder = _inside(pipeline, named[0])
    if not (folder / "config.json").is_file():
        raise DiffcError(
            f"model_index.json names the component {named[0]!r}, but {folder / 'config.json'} does not exist",
            fix="download the pipeline completely",
        )
    return folder


def _source(name: str, pipeline: Path | None, backbone: Path) -> ModelSource:
    """Read and check a backbone folder; the family first, since it costs nothing."""
    config = _read_json(backbone / "config.json")
    return ModelSource(
        name, pipeline, backbone, config, family=_family(backbone, config), weights=_weights(backbone)
    )


def _family(backbone: Path, config: Mapping[str, Any]) -> str:
    """The family of a backbone's config. Raises UnsupportedError that lists the known ones."""
    kind = config.get("_class_name")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family == "sdxl" and config.get("addition_embed_type") != "text_time":
        kind, family = (
            f"UNet2DConditionModel with addition_embed_type={config.get('addition_embed_type')!r}",
            None,
        )
    if family is None:
        known = ", ".join(f"{cls} ({name})" for cls, name in FAMILIES.items())
        raise UnsupportedError(
            f"{backbone / 'config.json'}: no support for a backbone of class {kind}."
            f" Known: {known}, the last with addition_embed_type='text_time'"
        )
    return family


def _weights(folder: Path) -> dict[str, Path]:
    """The file of every tensor, from an index or a single file, all headers checked."""
    path = _weights_file(folder)
    if path.suffix == ".json":
        return _sharded(path)
    weights = dict.fromkeys(_keys(path), path)
    if not weights:
        raise DiffcError(f"{path} holds no tensors", fix="download the model again")
    return weights


def _weights_file(folder: Path) -> Path:
    """The index or single safetensors file to take. Raises DiffcError without one, or a way to choose."""
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors.index*.json")) or sorted(folder.glob("*.safetensors"))
    if len(found) == 1 and "-of-" not in found[0].name:
        return found[0]
    if found:
        names = ", ".join(p.name for p in found)
        raise DiffcError(
            f"{folder}: no telling which weights to take from {names}; expected one of {', '.join(NAMES)}",
            fix="keep one set of weights; shards need their index.json",
        )
    raise _no_safetensors(folder)


def _no_safetensors(folder: Path) -> DiffcError:
    """The error for a folder without safetensors: pickled weights only, or none at all."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if not pickled:
        return DiffcError(
            f"folder without weights: {folder} has a config.json and no *.safetensors",
            fix="download the model completely (weights are large files that a plain git clone leaves out)",
        )
    kind = _read_json(folder / "config.json")["_class_name"]
    convert = f"from diffusers import {kind} as M; M.from_pretrained('.').save_pretrained('.')"
    return DiffcError(
        f"{folder} has pickled weights only ({pickled[0]}); diffc reads safetensors",
        fix=f'convert it, if you trust its origin (pickles run code): in that folder, python -c "{convert}"',
    )


def _sharded(index: Path) -> dict[str, Path]:
    """The file of every tensor of an index, each shard's header checked against it."""
    entries = _read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(v, str) for v in entries.values()):
        raise DiffcError(f"{index} has no weight_map of tensor names to files", fix="download it again")
    shards = {name: _inside(index.parent, name) for name in sorted(set(entries.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise DiffcError(
            f"{index.name} names files that {index.parent} does not have: {', '.join(missing)}",
            fix="download the model completely",
        )
    present = {name: set(_keys(path)) for name, path in shards.items()}
    for key, name in entries.items():
        if key not in present[name]:
            raise DiffcError(
                f"{index.name} says that {shards[name]} holds {key!r}, which it does not",
                fix="download index and shards again, of the same release",
            )
    return {key: shards[name] for key, name in entries.items()}


def _inside(folder: Path, name: str) -> Path:
    """`name` in `folder`. Raises DiffcError when it leaves it; links of the hub's cache to its own blobs may."""
    from passes.files.contained import why_outside

    if reason := why_outside(folder, name, hub=True):
        raise DiffcError(
            f"{folder}: the path {name!r} leaves the folder: {reason}",
            fix="put the file there in the place of a link, and get models from a source you trust",
        )
    return folder / name


def _keys(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file; its size must be what its header says."""
    _inside(path.parent, path.name)
    actual = path.stat().st_size
    expected = _expected_size(path, actual)
    if actual != expected:
        damage = "is truncated" if actual < expected else "is damaged"
        raise DiffcError(
            f"{path} {damage}: {actual} bytes, expected {expected}", fix="download the file again"
        )
    try:
        with safe_open(path, framework="numpy") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise DiffcError(f"{path} is damaged: {error}", fix="download the file again") from error


def _expected_size(path: Path, actual: int) -> int:
    """Bytes that the file must have by its header: 8 for the length, the header, the last tensor's end.

    https://huggingface.co/docs/safetensors/index#format. A file too short to tell: the bytes needed so far.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":  # as a header's length: 2 exabytes
            raise DiffcError(f"{path} is a Git LFS pointer, not the weights", fix="run `git lfs pull` there")
        length = int.from_bytes(start, "little")
        if actual < 8:
            return 8
        if length > MAX_HEADER:
            raise DiffcError(f"{path} is not a safetensors file", fix="download the file again")
        if actual < 8 + length:
            return 8 + length
        text = file.read(length)
    try:
        header = json.loads(text)
        ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DiffcError(
            f"{path} is not a safetensors file: its header does not parse", fix="download the file again"
        ) from error
    return 8 + length + max(ends, default=0)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DiffcError when it is not one."""
    _inside(path.parent, path.name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DiffcError(f"cannot read {path}: {error}", fix="check the file and its permissions") from error
    except ValueError as error:
        raise DiffcError(f"{path} is not valid JSON: {error}", fix="download the file again") from error
    if not isinstance(content, dict):
        raise DiffcError(f"{path} holds no JSON object", fix="download the file again")
    return content
