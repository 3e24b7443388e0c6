"""A model with LoRAs in its weights: a source like any other, whose recipes add what the LoRA files hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.lora_files import LoraSpec, lora_path
from diffc.models.sources.source import DEFAULT_HUB, HubOptions, ModelSource
from passes.base import PassError
from passes.weights.lora.fuse import Applied, apply_files, fuse


def with_loras(
    source: ModelSource, specs: Sequence[LoraSpec], hub: HubOptions = DEFAULT_HUB, *, partial: bool = False
) -> ModelSource:
    """`source` with the LoRAs in its weights; itself without any. Headers and scalars are read, and no weight.

    Changed weights are float32 recipes of W + sum of weight * difference, which whoever casts them rounds once.
    `partial`: keys that fit nothing are left out. Raises DiffcError for a file that is not there or does not fit.
    """
    if not specs:
        return source
    shapes = {name: recipe.shape for name, recipe in source.weights.items()}
    files = [(lora_path(spec, hub), spec.strength) for spec in specs]
    try:
        applied = apply_files(files, shapes, partial=partial)
        weights = fuse(source.weights, applied)
    except PassError as error:
        raise DiffcError(str(error)) from error
    return replace(source, weights=weights, base=source, loras=tuple(applied))


def described_loras(source: ModelSource, specs: Sequence[LoraSpec]) -> list[dict[str, Any]]:
    """What a manifest keeps of the LoRAs in a model: files with SHA-256, weights, what of them counts and what not."""
    return [_described(item, spec) for item, spec in zip(source.loras, specs, strict=True)]


def _described(applied: Applied, spec: LoraSpec) -> dict[str, Any]:
    path, matched = applied.file.path, applied.matched
    return {
        "file": spec.file,
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": _sha256(applied),
        "weight": spec.weight,
        "patterns": [list(pair) for pair in spec.patterns],
        "layers": dict(matched.layers),
        "parameters": len({change.parameter for change in matched.changes}),
        "left_out": [key for item in matched.unmatched for key in item.keys],
        "of_text_encoders": len(matched.text_encoder),
    }


def _sha256(applied: Applied) -> str:
    with applied.file.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_recorded_loras(source: ModelSource, manifest: Mapping[str, Any]) -> ModelSource:
    """`source` with the LoRAs of the compile that this manifest is of.

    Raises DiffcError when a file is not there or has changed.
    """
    recorded = manifest["model"].get("loras", ())
    for item in recorded:
        if not Path(item["path"]).is_file():
            raise DiffcError(
                f"the artifact was compiled with the LoRA {item['path']}, which is not there now",
                fix="put the file there again, or compile with it where it lies now: diffc relora",
            )
    specs = [replace(LoraSpec.from_json(item), file=item["path"]) for item in recorded]
    partial = bool(manifest.get("request", {}).get("lora_partial", False))
    fused = with_loras(source, specs, partial=partial)
    for item, applied in zip(recorded, fused.loras, strict=True):
        if _sha256(applied) != item["sha256"]:
            raise DiffcError(
                f"{applied.file.path} is not the LoRA file that the artifact was compiled with: its SHA-256 differs",
                fix="put the file of the compile there again",
            )
    return fused
