"""What a checkpoint remembers of its model: the backbone's config, and a hash of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

WHOLE_BYTES = 1 << 26
"""Files up to this size are hashed whole; of larger ones, the header and a block of every tensor."""
_BLOCK = 4096


def backbone_config(backbone: nn.Module) -> dict[str, Any]:
    """The config of a diffusers backbone as plain JSON values, defaults included, with its class name.

    What diffusers notes for itself (paths, versions: names with an underscore) is left out.
    """
    config: Any = backbone.config
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(own))
    return {"_class_name": type(backbone).__name__, **plain}


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, the same for any order of its entries."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def hash_weights(files: Iterable[Path]) -> str:
    """A fingerprint of safetensors files, cheap for gigabytes; independent of order and folder.

    Covers every header and size, small files whole, and of larger ones 4 KiB from the middle of every tensor.
    """
    digest = hashlib.sha256()
    for path in sorted(set(files), key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            length = file.read(8)
            header = file.read(int.from_bytes(length, "little"))
            digest.update(header)
            data = 8 + len(header)
            for begin, end in _spans(header):
                file.seek(data + max(begin, (begin + end - _BLOCK) // 2))
                digest.update(file.read(min(_BLOCK, end - begin)))
    return digest.hexdigest()


def _spans(header: bytes) -> list[tuple[int, int]]:
    """Where each tensor of a safetensors header begins and ends in the data, in file order."""
    entries = json.loads(header)
    return sorted(tuple(e["data_offsets"]) for name, e in entries.items() if name != "__metadata__")
