"""Values as people give them to a request, and the form in which diffc keeps them: text or os.PathLike, one or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

AnyPath = str | os.PathLike[str]
"""What a path can be given as."""
Given = TypeVar("Given")
Kept = TypeVar("Kept")
_REQUIRED: Any = object()


class Converted(Generic[Given, Kept]):
    """A field of a dataclass that takes a Given and is read as a Kept: `output: Converted[AnyPath, Path]`.

    `convert` makes one of the other; it must leave a Kept as it is, since dataclasses.replace gives it again. Without a
    `default` the field is required.
    """

    def __init__(self, convert: Callable[[Given], Kept], default: Any = _REQUIRED):
        self._convert, self._default = convert, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Kept:
        """The kept value; of the class, the default, which is how dataclasses ask for it."""
        if instance is None and self._default is _REQUIRED:
            raise AttributeError(self._name)
        kept: Kept = self._default if instance is None else vars(instance)[self._name]
        return kept

    def __set__(self, instance: object, value: Given) -> None:
        vars(instance)[self._name] = self._convert(value)


def as_path(value: AnyPath) -> Path:
    """A path, the user's home folder filled in."""
    path = Path(value)
    return path.expanduser() if path.parts[:1] and path.parts[0].startswith("~") else path


def is_there(text: str) -> bool:
    """Whether a text names a file or folder; False for what no path can be: too long, or of no user's home."""
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def as_text(value: AnyPath) -> str:
    """A name or place as text."""
    return value if isinstance(value, str) else os.fspath(value)


def as_path_or_none(value: AnyPath | None) -> Path | None:
    """A path; None stays."""
    return None if value is None else as_path(value)


def as_text_or_none(value: AnyPath | None) -> str | None:
    """A name or place as text; None stays."""
    return None if value is None else as_text(value)


def as_texts(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several names; a single one is a list of one."""
    return (value,) if isinstance(value, str) else tuple(value)


def as_texts_or_none(value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """Several names; a single one is a list of one, and None stays."""
    return None if value is None else as_texts(value)


def as_numbers(value: int | Iterable[int]) -> tuple[int, ...]:
    """Several numbers; a single one is a list of one."""
    return (value,) if isinstance(value, int) else tuple(value)
