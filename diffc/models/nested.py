"""Graph inputs by name -> the keyword arguments of forward(), nested as the model nests them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str | int, ...]
"""Where a value is in the keyword arguments of forward(): names of dictionaries, positions in lists."""


def nested(values: Iterable[tuple[Path, Any]], tuples: Iterable[Path] = ()) -> dict[str, Any]:
    """Dictionaries and lists that hold `values` at their places; lists at the places `tuples` are tuples.

    A position in a list that has no value holds None.
    """
    tree: dict[Any, Any] = {}
    for path, value in values:
        branch = tree
        for part in path[:-1]:
            branch = branch.setdefault(part, _Branch())
        branch[path[-1]] = value
    wanted = frozenset(tuples)
    return {key: _built(value, (key,), wanted) for key, value in tree.items()}


class _Branch(dict[Any, Any]):
    """A level of the tree, so that a dictionary among the values is not taken for one."""


def _built(value: Any, path: Path, tuples: frozenset[Path]) -> Any:
    if not isinstance(value, _Branch):
        return value
    inner = {key: _built(item, (*path, key), tuples) for key, item in value.items()}
    if all(isinstance(key, str) for key in inner):
        return inner
    items = [inner.get(i) for i in range(max(inner) + 1)]
    return tuple(items) if path in tuples else items


def places(arguments: Any, path: Path = ()) -> dict[Path, Any]:
    """The values in nested dictionaries, lists and tuples by place; nothing (None) has no place."""
    if not isinstance(arguments, Mapping | list | tuple):
        return {} if arguments is None else {path: arguments}
    return {p: v for key, inner in _items(arguments) for p, v in places(inner, (*path, key)).items()}


def tuple_places(arguments: Any, path: Path = ()) -> tuple[Path, ...]:
    """The places of all tuples."""
    if not isinstance(arguments, Mapping | list | tuple):
        return ()
    own = (path,) if isinstance(arguments, tuple) else ()
    return own + tuple(p for key, inner in _items(arguments) for p in tuple_places(inner, (*path, key)))


def dotted(path: Path) -> str:
    """A place as messages tell it: `added_cond_kwargs.text_embeds`."""
    return ".".join(map(str, path))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, Mapping) else enumerate(value)


def without_repeats(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, where a list that says the same of every image of the batch says it once.

    before: img_shapes=[[(1, 4, 6)], [(1, 4, 6)]]      after: img_shapes=[[(1, 4, 6)]]
    """
    return {name: value[:1] if _repeats(value) else value for name, value in arguments.items()}


def _repeats(value: Any) -> bool:
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], list | tuple):
        return False
    plain = all(isinstance(item, int | float | str) for item in places(value).values())
    return plain and all(item == value[0] for item in value)
