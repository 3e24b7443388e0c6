"""Small files as the original releases have them, made from embedded models."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffc.models.embedded.catalogue import EMBEDDED, materialize
from diffc.models.single.original import original_names
from diffc.models.sources.json_files import read_json

State = dict[str, torch.Tensor]


def backbone(model: str) -> tuple[Path, State]:
    """The backbone folder of an embedded model, and its weights by diffusers' names."""
    folder = materialize(model) / EMBEDDED[model].component
    return folder, load_file(next(folder.glob("*.safetensors")))


def released(model: str) -> tuple[State, State]:
    """The weights of an embedded model by the names of its release, and by those of diffusers."""
    folder, state = backbone(model)
    table = original_names(read_json(folder / "config.json")["_class_name"], state)
    assert table is not None
    assert sorted(part for made in table.values() for part in made.parts) == sorted(state)
    joined = {name: torch.cat([state[part] for part in made.parts]) for name, made in table.items()}
    halves = {name: torch.cat(joined[name].chunk(2)[::-1]) for name, made in table.items() if made.swapped}
    return joined | halves, state


def save(state: State, path: Path, prefix: str = "model.diffusion_model.", **metadata: str) -> Path:
    """A safetensors file of `state`, every name with `prefix`."""
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata=metadata or None)
    return path
