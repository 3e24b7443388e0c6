"""The door of JSON: a record is a mapping with the fields and types of a schema, or one message says which are not.

A schema is a `msgspec.Struct`: fields without a default must be there, the others may be, and what it does not name is
left alone. What was checked stays the plain mapping that it was, so readers and writers agree on one form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from diffc.errors import DiffcError
from passes.base import PassError
from passes.files.bounded import parse_object, read_text

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
"""A size: a whole number from 1 on, small enough for a float to hold it."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A whole number from 0 on, of 64 bits."""
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


def read_record(path: Path, schema: type[msgspec.Struct] | None = None, *, fix: str) -> dict[str, Any]:
    """The JSON object in the file `path`, as `schema` says. Raises DiffcError, with `fix`, for everything else."""
    try:
        return parse_record(read_text(path), path, schema, fix=fix)
    except PassError as error:
        raise of_pass_error(error, fix) from error


def parse_record(
    text: str | bytes, what: object, schema: type[msgspec.Struct] | None = None, *, fix: str
) -> dict[str, Any]:
    """The JSON object in a text, as `schema` says. Raises DiffcError that begins with `what`."""
    try:
        value = parse_object(text, what)
    except PassError as error:
        raise of_pass_error(error, fix) from error
    if schema is not None:
        check_record(value, what, schema, fix=fix)
    return value


def check_record(value: Mapping[str, Any], what: object, schema: type[msgspec.Struct], *, fix: str) -> None:
    """Raise DiffcError that names the first field of `value` that is not as `schema` says."""
    try:
        msgspec.convert(value, schema, strict=True)
    except msgspec.ValidationError as error:
        raise DiffcError(f"{what} is damaged: {error}", fix=fix) from error


def of_pass_error(error: PassError, fix: str) -> DiffcError:
    """The error of `passes` as one of diffc: its own fix stays, `fix` is for one without."""
    what, _, own = str(error).partition(". Fix: ")
    return DiffcError(what, fix=own or fix)
