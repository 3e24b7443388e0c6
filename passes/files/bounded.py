"""Small files that come from anybody, read within limits: what is no regular file is not opened, and JSON is plain.

A named pipe would be waited on for ever, a device read without an end, and a JSON text of 200,000 brackets ends a
process in the middle of whatever it was doing. Here each is one PassError.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from passes.base import PassError
from passes.files.atomic import irregular

TEXT_BYTES = 64 << 20
"""Bytes of a JSON or YAML file: the largest index of shards that was released has 0.5 MB."""
DEPTH = 100
"""Lists and mappings inside each other; a configuration has fewer than ten."""


def regular(path: Path) -> os.stat_result:
    """What the system says of the regular file `path`. Raises PassError for anything else, and where nothing is."""
    try:
        kind, found = irregular(path), path.stat()
    except FileNotFoundError as error:
        raise PassError(f"no such file: {path}. Fix: check the path") from error
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long a name, links in a circle
        raise PassError(
            f"cannot read {path}: {_said(error)}. Fix: check the path and its permissions"
        ) from error
    if kind:
        raise PassError(f"{path} is {kind}, not a file. Fix: name a file")
    return found


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit`. Raises PassError for any other, and when it cannot be read."""
    size = regular(path).st_size
    if size > limit:
        raise PassError(
            f"{path} has {size} bytes, and a file of its kind at most {limit}. Fix: name another file"
        )
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # a file of /proc says that it has no bytes
    except OSError as error:
        raise PassError(
            f"cannot read {path}: {_said(error)}. Fix: check the file and its permissions"
        ) from error
    if len(data) > limit:
        raise PassError(f"{path} has more than {limit} bytes. Fix: name another file")
    return data


def read_text(path: Path, limit: int = TEXT_BYTES) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises PassError as `read_bytes` does."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PassError(f"{path} is not text in UTF-8 ({error}). Fix: save it as UTF-8") from error


def parse_json(text: str | bytes, what: object) -> Any:
    """The value of a JSON text. Raises PassError that begins with `what`.

    A text that is not UTF-8, one that is nested deeper than DEPTH and one with NaN or Infinity, which JSON lacks, are
    refused too.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise _nested(what) from error
    except ValueError as error:
        raise PassError(f"{what} is not valid JSON: {error}") from error
    check_nesting(value, what)
    return value


def parse_object(text: str | bytes, what: object) -> dict[str, Any]:
    """The JSON object of a text. Raises PassError as `parse_json` does, and for any other value."""
    value = parse_json(text, what)
    if not isinstance(value, dict):
        raise PassError(f"{what} is not a JSON object")
    return value


def check_nesting(value: Any, what: object) -> None:
    """Raise PassError when lists and mappings are nested deeper than DEPTH, or hold themselves."""
    level, depth = {id(value): value}, 0
    while level:
        if depth > DEPTH:
            raise _nested(what)
        # One that is there under several names (an alias of YAML) is looked at once.
        level, depth = {id(item): item for part in level.values() for item in _items(part)}, depth + 1


def _items(value: Any) -> Iterator[Any]:
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return (part for part in parts if isinstance(part, (Mapping, list, tuple)))


def _nested(what: object) -> PassError:
    return PassError(f"{what} is nested deeper than {DEPTH} lists and mappings")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is larger than every number that a computer keeps")
    return number


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
