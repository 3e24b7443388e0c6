"""Writes recipes as a safetensors file: one tensor in memory at a time, each read back as a recipe by its name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from passes.base import PassError
from passes.weights.evaluate import tasks, to_bytes
from passes.weights.recipe import Recipe
from passes.weights.sources import SAFETENSORS_DTYPES, np_dtype

_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8
"""Bytes that the head of a safetensors file is a multiple of."""


def safetensors_header(
    entries: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file begins with, for tensors (name, type as the format calls it, shape, bytes) in order.

    It is padded with spaces, so that the data begin at a multiple of 8.
    """
    header, begin = dict[str, object](), 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name, dtype, shape, nbytes in entries:
        end = begin + nbytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path, tensors: Mapping[str, Recipe], metadata: Mapping[str, str] | None = None
) -> str:
    """Write `tensors` to the new file `path` in the order of their names; returns the SHA-256 of the file.

    `metadata` goes into the header as `__metadata__`. Equal tensors give equal bytes. Raises PassError for a type that
    the format lacks, FileExistsError when the file is there.
    """
    entries = []
    for name in sorted(tensors):
        recipe = tensors[name]
        dtype = np_dtype(recipe.dtype)
        if dtype not in _NAMES:
            raise PassError(
                f"the safetensors format has no type {dtype} (tensor {name!r}). Fix: choose another layout"
            )
        entries.append((name, _NAMES[dtype], recipe.shape, math.prod(recipe.shape) * dtype.itemsize))
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(safetensors_header(entries, metadata))
        for name in sorted(tensors):
            for task in tasks(tensors[name]):
                put(to_bytes(task()))
    return digest.hexdigest()
