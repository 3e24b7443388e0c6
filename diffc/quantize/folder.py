"""The folder of a checkpoint on disk, written atomically.

checkpoint.json          the record, with the hashes of the other files
quantizers.safetensors   amax, channel factors and low-rank branches
weights.safetensors      schema 2: the weights that differ from the model's, where training has changed them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from diffc.errors import DiffcError
from diffc.output_folders import written_folder
from diffc.quantize.schema import Record
from diffc.quantize.state import Amax
from diffc.records import check_record, of_pass_error, read_record
from passes.base import PassError
from passes.files.bounded import read_bytes, regular
from passes.files.contained import why_outside
from passes.weights.recipe import Recipe
from passes.weights.safetensors_writer import write_safetensors
from passes.weights.sources import safetensors_tensors

PLAIN, WITH_WEIGHTS = 1, 2
"""Schemas: a checkpoint without weights has the older one, which every diffc reads."""
RECORD, TENSORS, WEIGHTS = "checkpoint.json", "quantizers.safetensors", "weights.safetensors"
_CHUNK = 1 << 22
_AGAIN = "calibrate again, or copy it again"
_MOST = 1 << 30
"""Bytes of the file of scales, which is read whole: 0.1 GB for the largest model with a scale for 16 weights each."""


def write(
    directory: Path,
    record: Mapping[str, Any],
    tensors: Mapping[str, Amax],
    weights: Mapping[str, Recipe] | None = None,
) -> None:
    """Write all files, or nothing; equal arguments give equal bytes. An earlier checkpoint is replaced.

    Raises DiffcError when `directory` is something other than a checkpoint, and when it cannot be written.
    """
    check_place(directory)
    try:
        with written_folder(directory) as folder:
            _fill(folder, record, tensors, weights or {})
    except OSError as error:
        raise DiffcError(
            f"cannot write the checkpoint {directory}: {error}", fix="free space, or name another folder"
        ) from error


def check_place(directory: Path) -> None:
    """Raise DiffcError when `directory` is something other than a checkpoint or an empty folder."""
    if directory.exists() and not (directory / RECORD).is_file() and not _is_empty(directory):
        raise DiffcError(
            f"{directory} exists and is not a checkpoint (it has no {RECORD}); it was not changed",
            fix="name another folder",
        )


def _fill(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Amax], weights: Mapping[str, Recipe]
) -> None:
    # safetensors writes memory in its own order, and the matrices of an SVD are stored column by column.
    data = safetensors.numpy.save({name: np.array(array, order="C") for name, array in tensors.items()})
    content = {**record, "schema": PLAIN, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    if weights:
        digest = write_safetensors(folder / WEIGHTS, weights)
        content |= {"schema": WITH_WEIGHTS, "weights_sha256": digest}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / TENSORS).write_bytes(data)
    (folder / RECORD).write_text(text, encoding="utf-8", newline="\n")


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def read(
    directory: Path, names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Amax], dict[str, Recipe]]:
    """The entries `names` of the record, every tensor by its name, and a recipe for every weight.

    The file of weights is hashed and not kept in memory. Raises DiffcError when the folder is not a checkpoint, is
    damaged, or has a newer schema.
    """
    if not (directory / RECORD).is_file():
        raise DiffcError(
            f"no checkpoint at {directory}: expected a folder with {RECORD} and {TENSORS}",
            fix="give the folder that a calibration or `diffc train` wrote, where it lies now",
        )
    for name in (RECORD, TENSORS, WEIGHTS):
        if reason := why_outside(directory, name):
            raise damaged(directory, f"{name} lies outside: {reason}")
    content = _read_record(directory)
    record = {name: content[name] for name in names}
    tensors = _read_tensors(directory, content["tensors_sha256"])
    trained = content["schema"] == WITH_WEIGHTS
    return record, tensors, _read_weights(directory, content["weights_sha256"]) if trained else {}


def _read_record(directory: Path) -> dict[str, Any]:
    content = read_record(directory / RECORD, fix=_AGAIN)
    if content.get("schema") not in (PLAIN, WITH_WEIGHTS):
        found = content.get("schema")
        raise DiffcError(
            f"the checkpoint {directory} has schema {found}; this diffc reads schemas {PLAIN} and {WITH_WEIGHTS}",
            fix="calibrate again, or use the diffc that wrote it",
        )
    check_record(content, directory / RECORD, Record, fix=_AGAIN)
    if "weights_sha256" not in content and content["schema"] == WITH_WEIGHTS:
        raise damaged(directory, f"{RECORD} lacks 'weights_sha256'")
    return content


def _read_tensors(directory: Path, expected: str) -> dict[str, Amax]:
    try:
        content = read_bytes(directory / TENSORS, _MOST)
    except PassError as error:
        raise of_pass_error(error, _AGAIN) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise damaged(directory, f"{TENSORS} is not the file that {RECORD} was written with")
    try:
        return dict(safetensors.numpy.load(content))
    except safetensors.SafetensorError as error:
        raise damaged(directory, f"{TENSORS} is not a safetensors file ({error})") from error


def _read_weights(directory: Path, expected: str) -> dict[str, Recipe]:
    digest = hashlib.sha256()
    try:
        regular(directory / WEIGHTS)
        with (directory / WEIGHTS).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            raise damaged(directory, f"{WEIGHTS} is not the file that {RECORD} was written with")
        return safetensors_tensors(directory / WEIGHTS)
    except (OSError, PassError) as error:
        raise damaged(directory, f"{WEIGHTS} cannot be read ({error})") from error


def damaged(directory: Path, what: str) -> DiffcError:
    """The error for a checkpoint that cannot be right: `what` says why."""
    return DiffcError(f"the checkpoint {directory} is damaged: {what}", fix=_AGAIN)
