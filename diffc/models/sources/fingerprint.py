"""A fingerprint of weights, cheap for gigabytes: a calibration remembers with it which weights it saw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from passes.weights.evaluate import evaluate
from passes.weights.recipe import Recipe, Source

WHOLE_BYTES = 1 << 26
"""Files up to this size are hashed whole; of larger ones, the header and a block of every tensor."""
_BLOCK = 4096


def hash_weights(weights: Mapping[str, Recipe]) -> str:
    """The hash of all tensors, by what is read of them; independent of order and of where the files lie.

    Covers the size and the header of every file that the recipes read, small files whole, of larger ones 4 KiB from
    the middle of every tensor; and every recipe that is more than a tensor of a file under its own name.
    """
    digest = hashlib.sha256()
    sources = [source for recipe in weights.values() for source in recipe.sources]
    by_file: dict[Path, set[tuple[int, int]]] = {}
    for source in (source for source in sources if source.path):
        by_file.setdefault(Path(source.path), set()).add((source.offset, source.offset + source.length))
    for path in sorted(by_file, key=lambda p: p.name):
        _hash_file(digest, path, sorted(by_file[path]))
    computed = {name: recipe for name, recipe in weights.items() if not _is_plain(name, recipe)}
    if computed:
        text = json.dumps(
            {name: _without_folders(r.to_json()) for name, r in computed.items()}, sort_keys=True
        )
        digest.update(text.encode())
    return digest.hexdigest()


def _hash_file(digest: Any, path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Add a file to `digest`; `spans` are the first and last bytes of its tensors, in file order."""
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        spans = list(spans)
        file.seek(8)  # the length of a safetensors header, which the header itself implies
        digest.update(file.read(max(0, spans[0][0] - 8)))
        for begin, end in spans:
            file.seek(max(begin, (begin + end - _BLOCK) // 2))
            digest.update(file.read(min(_BLOCK, end - begin)))


def _is_plain(name: str, recipe: Recipe) -> bool:
    """Whether a recipe reads a tensor of a file as it is, under the name that it has there."""
    source: Source = recipe.source
    return not recipe.ops and source.kind == "raw" and source.key == name


def _without_folders(value: Any) -> Any:
    """JSON of a recipe in which paths are names of files."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):
        return {k: Path(v).name if k == "path" else _without_folders(v) for k, v in value.items()}
    return value


CONTENT = "content:"
"""What `hash_values` begins with, so that the two kinds of fingerprint are told apart."""


def hash_values(weights: Mapping[str, Recipe]) -> str:
    """The hash of names, types and values of all tensors: the same for a model in memory and for its saved copy.

    Every value is read. A recipe over memory has the hash of its values in it already.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        recipe = weights[name]
        key = recipe.source.key
        if recipe.ops or recipe.source.kind != "memory":
            values = np.ascontiguousarray(evaluate(recipe)).reshape(-1).view(np.uint8)
            key = hashlib.sha256(values.data).hexdigest()
        digest.update(f"{name} {recipe.dtype} {list(recipe.shape)} {key}\n".encode())
    return CONTENT + digest.hexdigest()
