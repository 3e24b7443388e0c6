"""What installed packages add to diffc by entry points: families, formats, targets, readers and commands.

    [project.entry-points."diffc.formats"]
    my_format = "my_package.formats:MY_FORMAT"

Nothing is imported before it is asked for. A plugin that cannot be used is left out, and `diffc doctor` says why.
Passes have a group of their own, which `passes.base` reads.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any, TypeVar

from diffc.errors import DiffcError
from passes.plugins import Broken, named, open_plugin

T = TypeVar("T")
_broken: dict[tuple[str, str], Broken] = {}


def load(group: str, kind: type[T], own: Collection[str] = ()) -> dict[str, T]:
    """The plugins of a group (`diffc.formats`) by name, without those that cannot be used.

    `kind` is the type that each must be (Format), `own` are the names that diffc itself has and that stay its own.
    """
    return dict(_load(group, kind, frozenset(own)))  # type: ignore[arg-type]  # a class can be hashed


@lru_cache(maxsize=32)
def _load(group: str, kind: type[Any], own: frozenset[str]) -> dict[str, Any]:
    def problem(name: str, value: Any) -> str:
        if not isinstance(value, kind):
            return f"it is a {type(value).__name__}, and {kind.__name__} is expected"
        if getattr(value, "name", name) != name:
            return f"its name is {value.name!r}, and the entry point is called {name!r}"
        return f"diffc itself has {name!r}; choose another name" if name in own else ""

    found = {}
    for name, points in named(group).items():
        value = open_plugin(points, lambda given, name=name: problem(name, given))  # type: ignore[misc]
        if isinstance(value, Broken):
            _broken[group, name] = value
        else:
            found[name] = value
    return found


def broken(group: str = "") -> tuple[Broken, ...]:
    """The plugins of a group, else of all groups read so far, that cannot be used, each with the reason."""
    return tuple(_broken[key] for key in sorted(_broken) if group in ("", key[0]))


def unusable(group: str, kind: str, name: str) -> DiffcError | None:
    """The error for a name that a plugin gives which cannot be used: what it is called, its packages and the reason.

    `kind` is what a user calls it, such as "format". None where no plugin gives the name: then it is unknown.
    """
    fault = _broken.get((group, name))
    if fault is None:
        return None
    return DiffcError(
        f"{kind} {name!r} is a plugin of {' and '.join(fault.packages)}: {fault.reason}",
        fix="update or uninstall the package; diffc doctor lists all plugins",
    )


def unusable_ones(group: str, kind: str) -> str:
    """One line for each plugin of a group that cannot be used, each after a line end; nothing where all can be."""
    found = (unusable(group, kind, fault.name) for fault in broken(group))
    return "".join(f"\n  {error.what}" for error in found if error is not None)
