"""Protocol buffers in their text form, as config.pbtxt has it; a message is a mapping of its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias


class Word(str):
    """A name of an enumeration, which stands without quotes."""


Field: TypeAlias = "str | int | bool | Mapping[str, Field] | Sequence[Field]"
"""A value of a field; a sequence is a repeated field."""


def message_text(fields: Mapping[str, Field], indent: str = "") -> str:
    """The message with one field a line, in the order given; text is quoted and escaped."""
    return "".join(f"{indent}{line}\n" for name, value in fields.items() for line in _lines(name, value))


def _lines(name: str, value: Field) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{name} {{"
        yield from message_text(value, "  ").splitlines()
        yield "}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, Mapping) for item in value):
            for item in value:
                yield from _lines(name, item)
        else:
            yield f"{name}: [{', '.join(map(_scalar, value))}]"
    else:
        yield f"{name}: {_scalar(value)}"


def _scalar(value: Field) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=True)
