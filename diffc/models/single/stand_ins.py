"""Tensors without data that converters of diffusers work on: each knows its recipe, so that a result does as well.

The converters rename, split, join, transpose and reshape; none computes with values. An operation that does raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from diffc.errors import DiffcError
from passes.weights.moves import joined, part
from passes.weights.recipe import Recipe

Keys = frozenset[str]


def stand_in(recipe: Recipe, key: str) -> Any:
    """A tensor of the shape of `recipe`, which is the tensor `key` of a file."""
    return _class()(recipe, frozenset((key,)))


def recipe_of(tensor: Any) -> tuple[Recipe, Keys]:
    """The recipe of what a converter made, and the keys of the file that went into it.

    Raises DiffcError for a tensor with values of its own.
    """
    if not hasattr(tensor, "recipe"):
        raise DiffcError(
            f"a converter of diffusers made a tensor of its own: {type(tensor).__name__}",
            fix="give the folder that diffusers saves (save_pretrained)",
        )
    return tensor.recipe, tensor.keys


@cache
def _class() -> type[Any]:
    import torch

    class StandIn(torch.Tensor):
        """Shape, recipe and keys; all of one type, since no converter asks for it."""

        recipe: Recipe
        keys: Keys

        @staticmethod
        def __new__(cls, recipe: Recipe, keys: Keys) -> Any:
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, recipe.shape, dtype=torch.float32, device=torch.device("cpu")
            )
            tensor.recipe, tensor.keys = recipe, keys
            return tensor

        @classmethod
        def __torch_dispatch__(  # type: ignore[override]  # torch leaves args and kwargs out
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            del types
            name = func._schema.name.removeprefix("aten::")
            if name not in _MOVES:
                raise DiffcError(
                    f"a converter of diffusers computes with weights (aten::{name})",
                    fix="give the folder that diffusers saves (save_pretrained)",
                )
            inputs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            keys = frozenset[str]().union(*(item.keys for item in inputs))
            recipes = [item.recipe for item in inputs]
            named = dict(kwargs or {})
            made = _MOVES[name](
                recipes if isinstance(args[0], (list, tuple)) else recipes[0], *args[1:], **named
            )
            return [cls(item, keys) for item in made] if isinstance(made, list) else cls(made, keys)

    return StandIn


def _sizes(total: int, sizes: list[int]) -> list[int]:
    """`sizes`, or their proportions where they do not add up: FLUX's converter has the widths of its releases in it."""
    asked = sum(sizes)
    if asked == total or any(size * total % asked for size in sizes):
        return sizes
    return [size * total // asked for size in sizes]


def _split(x: Recipe, size: int | list[int], dim: int = 0) -> list[Recipe]:
    total = x.shape[dim]
    if isinstance(size, int):
        sizes = [min(size, total - begin) for begin in range(0, total, max(1, size))]
    else:
        sizes = _sizes(total, list(size))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if sum(sizes) != total:
        raise DiffcError(
            f"a weight of {total} rows cannot be split into {sizes}",
            fix="give the folder that diffusers saves (save_pretrained)",
        )
    return [part(x, dim, begin, begin + count) for begin, count in zip(starts, sizes, strict=True)]


def _view(x: Recipe, shape: list[int]) -> Recipe:
    known = math.prod(size for size in shape if size != -1)
    filled = tuple(math.prod(x.shape) // max(1, known) if size == -1 else size for size in shape)
    return x if filled == x.shape else x.reshape(filled)


def _transpose(x: Recipe, first: int, second: int) -> Recipe:
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    return x.transpose(tuple(order))


def _slice(
    x: Recipe, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Recipe:
    begin, stop, stride = slice(start, end, step).indices(x.shape[dim])
    if stride == 1:
        return part(x, dim, begin, max(begin, stop))
    picked = [part(x, dim, index, index + 1) for index in range(begin, stop, stride)]
    return joined(picked, dim % len(x.shape))


def _select(x: Recipe, dim: int, index: int) -> Recipe:
    dim %= len(x.shape)
    index %= x.shape[dim]
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    return part(x, dim, index, index + 1).reshape(shape)


def _squeeze(x: Recipe, dim: int | list[int] | None = None) -> Recipe:
    chosen = range(len(x.shape)) if dim is None else dim if isinstance(dim, list) else [dim]
    gone = {axis % len(x.shape) for axis in chosen}
    shape = tuple(size for axis, size in enumerate(x.shape) if axis not in gone or size != 1)
    return x if shape == x.shape else x.reshape(shape)


def _unsqueeze(x: Recipe, dim: int) -> Recipe:
    dim %= len(x.shape) + 1
    return x.reshape((*x.shape[:dim], 1, *x.shape[dim:]))


def _stack(items: list[Recipe], dim: int = 0) -> Recipe:
    return joined([_unsqueeze(item, dim) for item in items], dim)


def _same(x: Recipe, *_: Any, **__: Any) -> Recipe:
    return x


_MOVES: Mapping[str, Callable[..., Any]] = {
    "split": _split,
    "split_with_sizes": _split,
    "cat": lambda items, dim=0: joined(items, dim % len(items[0].shape)),
    "stack": _stack,
    "slice": _slice,
    "select": _select,
    "unbind": lambda x, dim=0: [_select(x, dim, index) for index in range(x.shape[dim])],
    "view": _view,
    "_unsafe_view": _view,
    "reshape": _view,
    "transpose": _transpose,
    "t": lambda x: x.transpose(tuple(reversed(range(len(x.shape))))),
    "permute": lambda x, dims: x.transpose(tuple(axis % len(x.shape) for axis in dims)),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "narrow": lambda x, dim, start, length: part(x, dim, start, start + length),
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "contiguous": _same,
    "_to_copy": _same,
}
