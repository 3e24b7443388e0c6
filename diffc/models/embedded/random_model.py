"""Backbones of released models in full size, with random weights in place of the trained ones.

They show what a compile of the released model costs, and that it works, where its weights cannot be had. What they
generate is noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffc.errors import DiffcError, unknown
from diffc.models.capture.pipeline import empty_model
from diffc.models.embedded import catalogue
from diffc.models.embedded.random_weights import Tensor, check_room, write_safetensors
from diffc.models.embedded.real import RELEASES, RealModel, RealPipeline
from diffc.models.registry import find_family
from diffc.models.sources.backbone import build_backbone
from diffc.output_folders import written_folder
from diffc.progress import Reporter, Silent

NOTE = "diffc-random.json"
"""The file in a finished folder that says that its weights are random, and of which seed."""
_SHARD = 10_000_000_000
"""Bytes of a file of weights, as `save_pretrained` cuts them by default."""


def make_random(name: str, directory: Path, *, seed: int = 0, ui: Reporter | None = None) -> Path:
    """Write a real model with seeded random weights to `directory` and return it.

    A backbone folder; of a model in PIPELINES a pipeline folder, whose other components are configurations alone:
    all that a compile without prompts reads. Safetensors are cut into files of 10 GB as the releases are. Equal
    name and seed give equal bytes. A folder that already holds this is left as it is. Raises DiffcError for an
    unknown name, for a directory that holds something else, and, before anything is written, when the disk has no
    room.
    """
    if name not in RELEASES:
        raise unknown("real model", name, RELEASES)
    model, note = RELEASES[name], {"name": name, "seed": seed, "weights": "random", "recipe": 1}
    if _note(directory) == note:
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise DiffcError(
            f"{directory} exists and is not {name} of seed {seed}", fix="remove it or name another"
        )
    try:
        with written_folder(directory) as folder:
            if isinstance(model, RealPipeline):
                write_pipeline(model, folder, seed, ui or Silent())
            else:
                write_backbone(model, folder, seed, ui or Silent())
            (folder / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        fix = "free space, or give a place that can be written"
        raise DiffcError(f"cannot write {name} to {directory}: {error}", fix=fix) from error
    return directory


def make(
    name: str, directory: Path, *, random_weights: bool, seed: int = 0, ui: Reporter | None = None
) -> Path:
    """Write an embedded model, or, with `random_weights`, a real one. Raises DiffcError as the two makers do."""
    if name in RELEASES and not random_weights:
        raise DiffcError(
            f"diffc has the configuration of {name}, not its weights",
            fix="download the model, or give --random-weights for one that is as large and paints noise",
        )
    if name not in (RELEASES | catalogue.EMBEDDED):
        raise unknown("model", name, RELEASES | catalogue.EMBEDDED)
    if name in catalogue.EMBEDDED and random_weights:
        raise DiffcError(f"{name} comes with its weights", fix="leave --random-weights out")
    return (
        make_random(name, directory, seed=seed, ui=ui)
        if name in RELEASES
        else catalogue.make(name, directory)
    )


def shapes_of(model: RealModel) -> dict[str, tuple[int, ...]]:
    """Every tensor of the backbone's state by its name; no weight is allocated."""
    with torch.device("meta"):
        backbone = build_backbone(find_family(model.family), model.config, torch.float16)
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}


def _note(directory: Path) -> Any:
    try:
        return json.loads((directory / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_backbone(model: RealModel, folder: Path, seed: int, ui: Reporter) -> None:
    """Write config.json and the weights of `model` to `folder`. Raises DiffcError when the disk has no room."""
    with ui.stage(f"read the configuration of {model.name}"):
        tensors = [Tensor(name, shape, model.dtype) for name, shape in shapes_of(model).items()]
    check_room(folder, sum(tensor.nbytes for tensor in tensors))
    _write_json(folder / "config.json", model.config)
    write_weights(folder, tensors, f"{model.name}/{seed}", ui)


def write_pipeline(model: RealPipeline, folder: Path, seed: int, ui: Reporter) -> None:
    """Write the configurations of `model` to `folder`, and the weights of its backbones.

    Raises DiffcError when the disk has no room.
    """
    with ui.stage(f"read the configuration of {model.name}"):
        for name, content in model.parts.items():
            _write_json(folder / _config_file(name), content)
        tensors = {name: pipeline_tensors(model, folder / name) for name in model.backbones}
    check_room(folder, sum(tensor.nbytes for each in tensors.values() for tensor in each))
    for name, each in tensors.items():
        write_weights(folder / name, each, f"{model.name}/{name}/{seed}", ui)


def _config_file(part: str) -> str:
    """Where diffusers looks for the configuration of a part of a pipeline, relative to its folder."""
    if part == "model_index":
        return "model_index.json"
    kind = part.partition("_")[0]
    return f"{part}/{kind}_config.json" if kind in ("scheduler", "tokenizer") else f"{part}/config.json"


def pipeline_tensors(model: RealPipeline, component: Path) -> list[Tensor]:
    """Every tensor of the state of the backbone in the folder `component`; no weight is allocated."""
    state = empty_model(component).state_dict()
    return [Tensor(name, tuple(tensor.shape), model.dtype) for name, tensor in state.items()]


def write_weights(folder: Path, tensors: list[Tensor], seed: str, ui: Reporter) -> None:
    """Write tensors of random values to `folder`, in as many files as diffusers would, with an index."""
    files = _named(list(_shards(tensors)))
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    with ui.stage(f"write random weights, {total / 1e9:.1f} GB") as update:
        for name, shard in files.items():
            for count in write_safetensors(folder / name, shard, seed):
                done += count
                update(done, total)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor.name: name for name, shard in files.items() for tensor in shard},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in their order, as many to a file as fit."""
    shard: list[Tensor] = []
    for tensor in tensors:
        if shard and sum(t.nbytes for t in shard) + tensor.nbytes > _SHARD:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _named(shards: list[list[Tensor]]) -> dict[str, list[Tensor]]:
    """File names as diffusers gives them."""
    if len(shards) == 1:
        return {"diffusion_pytorch_model.safetensors": shards[0]}
    count = len(shards)
    return {
        f"diffusion_pytorch_model-{i:05}-of-{count:05}.safetensors": shard
        for i, shard in enumerate(shards, 1)
    }
