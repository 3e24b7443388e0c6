"""Small backbone folders, as diffusers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from diffc.models.embedded import tiny
from passes.weights.recipe import Recipe


def config_of(class_name: str, config: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """A config.json as it is read."""
    return dict(json.loads(json.dumps({"_class_name": class_name, **config, **changed})))


FLUX = config_of("FluxTransformer2DModel", tiny.FLUX, num_layers=1)
KEYS = ("a.weight", "b.weight", "c.bias")
FILE = "diffusion_pytorch_model.safetensors"


def tensors(keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    return {key: generator.standard_normal((4, 6)).astype(np.float16) for key in keys}


def backbone(folder: Path, config: dict[str, Any] | None = None, weights: str | None = FILE) -> Path:
    """A small backbone folder; `weights` None leaves them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FLUX if config is None else config))
    if weights:
        save_file(tensors(), folder / weights)
    return folder


def sharded(folder: Path, weight_map: dict[str, str], index: str = FILE + ".index.json") -> Path:
    """A backbone of two shards: the first holds KEYS[:2], the second the rest."""
    backbone(folder, weights=None)
    save_file(tensors(KEYS[:2]), folder / "m-00001-of-00002.safetensors")
    save_file(tensors(KEYS[2:]), folder / "m-00002-of-00002.safetensors")
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def files_of(weights: dict[str, Recipe]) -> dict[str, Path]:
    """The file that each tensor lies in; every recipe must be the tensor of its own name, as it is."""
    assert all(not recipe.ops and recipe.source.key == name for name, recipe in weights.items())
    return {name: Path(recipe.source.path) for name, recipe in weights.items()}


SHARDS = dict(zip(KEYS, ["m-00001-of-00002.safetensors"] * 2 + ["m-00002-of-00002.safetensors"], strict=True))
