"""Pipelines of released models in full size with seeded random weights, made where they are measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffc.models.embedded.catalogue import materialize
from diffc.models.embedded.random_model import shapes_of
from diffc.models.embedded.random_weights import Tensor, distribution
from diffc.models.embedded.real import REAL
from diffc.models.registry import find_family

_TINY = {
    "flux-dev": "tiny-flux",
    "flux-schnell": "tiny-flux",
    "sd3-medium": "tiny-sd3",
    "sd35-medium": "tiny-sd3",
}
"""The pipeline whose tokenizers, scheduler and VAE are taken."""
_SHARD = 8_000_000_000
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_T5 = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24}
ENCODERS: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "flux": {"text_encoder": {**_CLIP_L, "projection_dim": 768}, "text_encoder_2": _T5},
    "sd3": {
        "text_encoder": {**_CLIP_L, "projection_dim": 768},
        "text_encoder_2": {**_CLIP_G, "projection_dim": 1280},
        "text_encoder_3": _T5,
    },
}
"""Sizes of CLIP-L, CLIP-G and T5-XXL, as the releases' config.json have them."""


def make_pipeline(name: str, folder: Path) -> None:
    """Write the pipeline of a model in REAL, or of an embedded one, to `folder`; one that is there stays."""
    if (folder / "model_index.json").is_file():
        return
    model = REAL.get(name)
    if model is None:
        shutil.copytree(materialize(name), folder)
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    component = find_family(model.family).component
    shutil.copytree(
        materialize(_TINY[name]), part, ignore=lambda at, names: [n for n in names if n == component]
    )
    dtype = getattr(torch, model.dtype)
    (part / component).mkdir()
    config = {**model.config, "_class_name": find_family(model.family).backbone_class}
    _write_json(part / component / "config.json", config)
    _write_weights(part / component, "diffusion_pytorch_model", shapes_of(model), dtype)
    for encoder, sizes in ENCODERS[model.family].items():
        _write_encoder(part / encoder, sizes, dtype)
    part.rename(folder)


def _write_encoder(folder: Path, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """The encoder of a tiny pipeline in another size; its tokenizer, and so its vocabulary, stays."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | dict(sizes)
    config["dtype"] = str(dtype).removeprefix("torch.")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    _write_json(folder / "config.json", config)
    cls: Any = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        module = cls(cls.config_class.from_pretrained(folder))
    shapes = {key: tuple(tensor.shape) for key, tensor in module.named_parameters()}
    _write_weights(folder, "model", shapes, dtype)


def _write_weights(
    folder: Path, stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Seeded random weights of these shapes, in files with an index, made on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    where, size = {}, 0
    shards = list(_shards(shapes))
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        made = {}
        for key in names:
            mean, std = distribution(Tensor(key, shapes[key], str(dtype).removeprefix("torch.")))
            values = torch.empty(shapes[key], dtype=dtype, device=device).normal_(
                mean, std, generator=generator
            )
            made[key] = values.cpu()
            size += values.nbytes
            where[key] = file
        save_file(made, folder / file, metadata={"format": "pt"})
    _write_json(
        folder / f"{stem}.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": where},
    )


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors in their order, as many to a file as fit."""
    names: list[str] = []
    total = 0
    for key, shape in shapes.items():
        names.append(key)
        total += 2 * prod(shape)
        if total > _SHARD:
            yield names
            names, total = [], 0
    if names:
        yield names


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
