"""Random but plausible inputs of a backbone, for tracing and comparing: seeded, never zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch

from diffc.errors import DiffcError
from diffc.memory import check_room
from diffc.models.family import Family
from diffc.models.lists import LENGTHS, joined, parted
from diffc.models.nested import Path, dotted, nested, places, without_repeats
from diffc.models.spec import Config, InputSpec, Shape


def random_inputs(
    family: Family, config: Config, shape: Shape, *, dtype: torch.dtype, seed: int
) -> dict[str, torch.Tensor]:
    """Every graph input at `shape` by name, on the CPU; "model" inputs in `dtype`, the others in their own type."""
    generator = torch.Generator().manual_seed(seed)
    shapes, sizes = family.input_shapes(config, shape), family.sizes(shape)
    values_in_all = sum(prod(size) for size in shapes.values())
    check_room(8 * values_in_all, f"the inputs at {shape}", fix="ask for a smaller shape")
    values = {}
    for item in family.inputs(config):
        if item.sample == "lengths":
            longest = shapes[item.name.removesuffix(LENGTHS)][1]
            value = _lengths(longest, torch.rand(shapes[item.name], generator=generator))
        else:
            value = _sample(_within(item, sizes), shapes[item.name], shape, generator)
        values[item.name] = value.to(dtype if item.dtype == "model" else _TYPES[item.dtype])
    return values


_TYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}


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
    if item.sample == "mask":
        return _mask(size, uniform)
    if item.sample == "seen":
        drawn = item.low + uniform * (item.high - item.low if item.high > item.low else 0.0)
        return drawn.round() if item.dtype == "int64" else drawn
    return torch.randn(size, generator=generator)


def _within(item: InputSpec, sizes: Mapping[str, int]) -> InputSpec:
    """The input with the values that it may have at `sizes`: numbers of rows stay below the number of rows."""
    return item if item.bound is None else replace(item, high=sizes[item.bound] - 1)


def _lengths(longest: int, uniform: torch.Tensor) -> torch.Tensor:
    """Numbers of tokens from half of `longest` on; the first image has as many as there are."""
    found = (longest * (0.5 + uniform / 2)).ceil()
    found[0] = longest
    return found


def _mask(size: tuple[int, ...], uniform: torch.Tensor) -> torch.Tensor:
    """Ones, then zeros along the last axis, as for padded prompts: at least half of each row is ones."""
    length = size[-1]
    kept = (length * (0.5 + uniform[..., :1] / 2)).ceil()
    return (torch.arange(length) < kept).float()


def _grid(tokens: int, shape: Shape) -> torch.Tensor:
    """FLUX positions: (0, row, column) of every image token, as FluxPipeline prepares them."""
    rows = max(1, round((tokens * shape.height / shape.width) ** 0.5))
    index = torch.arange(tokens)
    columns = -(-tokens // rows)
    return torch.stack([torch.zeros(tokens), index // columns, index % columns], dim=1)


def forward_kwargs(
    family: Family, config: Config, values: dict[str, Any], *, batched: bool = False
) -> dict[str, Any]:
    """Graph inputs by name -> the keyword arguments of forward(), nested where the model nests them.

    Of an input that stands for a number, the argument is its length. `batched`: for a forward() of
    `diffc.models.batched`, which takes one tensor for a list.
    """
    placed = [
        (
            item.path or (item.name,),
            _length(values[item.name]) if item.sample == "size" else values[item.name],
        )
        for item in family.inputs(config)
    ]
    found = nested([*placed, *family.constants], family.tuples)
    return parted(found, family.lists) if family.lists and not batched else found


def named_inputs(
    family: Family, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The inverse of `forward_kwargs` for a call that a diffusers pipeline makes: graph inputs by name, as tensors.

    Positional arguments are taken in the order of the inputs that are not nested. Raises DiffcError for an input
    that the call does not have, and for an argument that the backbone's graph has no input for.
    """
    items = {item.path or (item.name,): item for item in family.inputs(config)}
    positions = [str(path[0]) for path in items if len(path) == 1]
    fixed = {path for path, _ in family.constants}
    inner = {path[0] for path in (*items, *fixed) if len(path) > 1}
    named: dict[str, Any] = dict(zip(positions, args, strict=False))
    named |= without_repeats(kwargs)
    given: dict[Path, Any] = {}
    for name, value in joined(named, family.lists).items():
        given |= places(value, (name,)) if name in inner else {(name,): value}
    strange = [
        p for p, v in given.items() if p not in items and p not in fixed and isinstance(v, torch.Tensor)
    ]
    lacking = [path for path in items if given.get(path) is None]
    if strange or lacking:
        path = lacking[0] if lacking else strange[0]
        what = f"has no {dotted(path)}" if lacking else f"gives {dotted(path)} as well"
        raise DiffcError(
            f"the pipeline's call of its {family.name} backbone {what}",
            fix="report it with the versions of diffc and diffusers",
        )
    return {item.name: _as_tensor(item, given[path]) for path, item in items.items()}


def _as_tensor(item: InputSpec, value: Any) -> torch.Tensor:
    """A value of a call as the graph takes it: a number that stands for a size is a tensor of that length."""
    return torch.zeros(int(value)) if item.sample == "size" else torch.as_tensor(value)


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, torch.Tensor) else value


def tensors_of(found: Any) -> tuple[torch.Tensor, ...]:
    """The tensors in what a forward() returned, in order."""
    if isinstance(found, torch.Tensor):
        return (found,)
    items = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else ()
    return tuple(tensor for item in items for tensor in tensors_of(item))
