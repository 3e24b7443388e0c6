"""Random but plausible inputs of a backbone, for tracing and comparing: seeded, never zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.spec import Config, InputSpec, Shape


def random_inputs(
    family: Family, config: Config, shape: Shape, *, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """Every graph input at `shape` by name, on the CPU; "model" inputs in `dtype`, the others in float32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = family.input_shapes(config, shape)
    values = {}
    for item in family.inputs(config):
        value = _sample(item, shapes[item.name], shape, generator)
        values[item.name] = value.to(dtype if item.dtype == "model" else torch.float32)
    return values


def _sample(item: InputSpec, size: tuple[int, ...], shape: Shape, generator: torch.Generator) -> torch.Tensor:
    uniform = torch.rand(size, generator=generator)
    if item.sample == "timestep":
        return (uniform * 998 + 1).round()
    if item.sample == "sigma":
        return uniform * 0.98 + 0.01
    if item.sample == "guidance":
        return uniform * 5 + 1
    if item.sample == "text_ids":
        return (uniform * 3).floor()  # pipelines pass zeros, which would hide an input that is lost
    if item.sample == "image_ids":
        return _grid(size[0], shape)
    if item.sample == "time_ids":
        return (uniform * 96).round() * 8 + 256  # sizes and crops in pixels
    return torch.randn(size, generator=generator)


def _grid(tokens: int, shape: Shape) -> torch.Tensor:
    """FLUX positions: (0, row, column) of every image token, as FluxPipeline prepares them."""
    rows = max(1, round((tokens * shape.height / shape.width) ** 0.5))
    index = torch.arange(tokens)
    columns = -(-tokens // rows)
    return torch.stack([torch.zeros(tokens), index // columns, index % columns], dim=1)


def forward_kwargs(family: Family, config: Config, values: dict[str, Any]) -> dict[str, Any]:
    """Graph inputs by name -> the keyword arguments of forward(), nested where the model nests them."""
    kwargs: dict[str, Any] = {}
    for item in family.inputs(config):
        outer, *inner = item.path or (item.name,)
        if inner:
            kwargs.setdefault(outer, {})[inner[0]] = values[item.name]
        else:
            kwargs[outer] = values[item.name]
    return kwargs


def named_inputs(
    family: Family, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The inverse of `forward_kwargs` for a call that a diffusers pipeline makes: graph inputs by name, as tensors.

    Positional arguments are taken in the order of the inputs that are not nested. Raises DiffcError for an input
    that the call does not have, and for an argument that the backbone's graph has no input for.
    """
    items = {item.path or (item.name,): item for item in family.inputs(config)}
    positions = [path[0] for path in items if len(path) == 1]
    given: dict[tuple[str, ...], Any] = {(n,): v for n, v in zip(positions, args, strict=False)}
    for name, value in kwargs.items():
        nested = isinstance(value, Mapping) and any(path[0] == name for path in items)
        given |= {(name, k): v for k, v in value.items()} if nested else {(name,): value}
    strange = [path for path, value in given.items() if path not in items and isinstance(value, torch.Tensor)]
    lacking = [path for path in items if given.get(path) is None]
    if strange or lacking:
        what = f"has no {'.'.join(lacking[0])}" if lacking else f"gives {'.'.join(strange[0])} as well"
        raise DiffcError(f"the pipeline's call of its {family.name} backbone {what}")
    return {item.name: torch.as_tensor(given[path]) for path, item in items.items()}
