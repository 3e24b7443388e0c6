"""config.json of a backbone, held against what its family reads from it, before anything is built by its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from diffc.errors import DiffcError
from diffc.models.family import Family
from diffc.models.spec import Config
from passes.weights.recipe import Recipe

_FIX = "take config.json and weights of the same model again"
_LARGEST = 1 << 24
"""A size of a model: width, vocabulary, positions."""
_COUNTS = re.compile(r"(^|_)(layers|blocks|depth)$|(^|_)layers_per_")
"""Names of entries that say how many modules there are."""
_SPREAD = {"pos_embed_max_size": 2}
"""Entries of which a table has this power of rows, all of them in the weights."""


class _Watched(Mapping[str, Any]):
    """A config that knows which entry was read last: that one is to blame when a family stumbles."""

    def __init__(self, config: Config):
        self._config, self.last = config, ""

    def __getitem__(self, key: str) -> Any:
        self.last = key
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)


def check_config(family: Family, config: Config, place: object) -> None:
    """Raise DiffcError that names the entry which keeps the family from telling inputs, sizes and usual shape."""
    watched = _Watched(config)
    try:
        dynamic = {dim.name for dim in family.dims(watched)}
        places = [item.dims for item in family.inputs(watched)]
        places += [item.dims for item in family.outputs(watched)]
        sizes: list[Any] = [n for dims in places for n in dims if not isinstance(n, str) or n not in dynamic]
        for dim in family.dims(watched):
            sizes += [dim.multiple, *([] if dim.maximum is None else [dim.maximum])]
        sizes += [family.pixel_multiple(watched), *family.native(watched).described().values()]
        family.attributes(watched)
        wrong = [size for size in sizes if not isinstance(size, int) or not 0 < size <= _LARGEST]
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise _damaged(watched, config, place) from error
    if wrong:
        raise DiffcError(f"{place}: a size of {family} comes out as {str(wrong[0])[:40]}", fix=_FIX)


def _damaged(watched: _Watched, config: Config, place: object) -> DiffcError:
    key = watched.last
    what = (
        f"has no {key}"
        if key not in config
        else f"has {key} = {str(config[key])[:80]!r}, which is no such size"
    )
    return DiffcError(f"{place} {what}", fix=_FIX)


def check_numbers(config: Config, place: object, weights: Mapping[str, Recipe] | None = None) -> None:
    """Raise DiffcError for a number by which a model that cannot be would be built: it would take for ever.

    `weights` are those of the model, where they are known: there are no more layers than tensors.
    """
    most = max(64, len(weights)) if weights else 4096
    elements = sum(prod(recipe.shape) for recipe in weights.values()) if weights else None
    for key, number in _numbers(config):
        limit = most if _COUNTS.search(key) else _LARGEST
        if abs(number) > limit:
            raise DiffcError(f"{place} has {key} = {str(number)[:40]}, and at most {limit} can be", fix=_FIX)
        if elements and key in _SPREAD and number ** _SPREAD[key] > max(elements, 1 << 20):
            raise DiffcError(
                f"{place} has {key} = {number}, and the weights have {elements} values", fix=_FIX
            )


def _numbers(config: Config) -> Iterator[tuple[str, int]]:
    """Whole numbers of a config with the name of their entry; those in lists have the name of the list."""
    left: list[tuple[str, Any]] = list(config.items())
    while left:
        key, value = left.pop()
        if isinstance(value, int) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, Mapping):
            left.extend((str(name), item) for name, item in value.items())
        elif isinstance(value, list | tuple):
            left.extend((key, item) for item in value)
