"""Ways to make a valid file wrong: random damage to its bytes, and lies in the fields of a record or a message."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

from hypothesis import strategies as st

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 7, 1 << 31, 1 << 63, -(1 << 63), 1 << 80, 0.5, -0.0, 1e308),
    *("", "x", "../x", "/etc/passwd", "C:\\x", "a\0b", "\x1b[2J", "[/red]", "é" * 300, "n" * 5000, "NaN"),
    *([], [[]], [None], {}, {"a": {}}, [1, 2], ["x", "y"], [-1], [1 << 62, 1 << 62]),
)
"""Values that a field was not made for."""
TEXTS = ("{", "[" * 5000, '{"a":' * 2000, "NaN", '{"a": NaN}', '{"a": 1e999}', "null", "[]", "\ufeff{}", "")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four pieces cut off, turned, doubled, put in or set to one value."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not made:
            break
        start = draw(st.integers(0, len(made) - 1))
        length = draw(st.integers(1, min(16, len(made) - start)))
        kind = draw(st.sampled_from(("cut", "flip", "insert", "fill", "double", "drop")))
        if kind == "cut":
            del made[start:]
        elif kind == "flip":
            made[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            made[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "fill":
            made[start : start + length] = bytes([draw(st.sampled_from((0, 1, 127, 128, 255)))]) * length
        elif kind == "double":
            made[start:start] = made[start : start + length]
        else:
            del made[start : start + length]
    return bytes(made)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def lied(draw: st.DrawFn, record: Any) -> Any:
    """A JSON value with one or two fields of another value, left out, or under another name."""
    made = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(made)))
        if not path:
            continue
        owner = made
        for key in path[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(("set", "set", "set", "drop", "rename")))
        if kind == "set" or isinstance(owner, list):
            owner[path[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "drop":
            del owner[path[-1]]
        else:
            owner[f"{path[-1]}x"] = owner.pop(path[-1])
    return made


@st.composite
def json_file(draw: st.DrawFn, record: Any) -> bytes:
    """The text of a record with lies, or of something else, or damaged."""
    kind = draw(st.sampled_from(("lie", "lie", "lie", "lie", "text", "bytes")))
    if kind == "text":
        return draw(st.sampled_from(TEXTS)).encode()
    if kind == "bytes":
        return draw(damaged(json.dumps(record).encode()))
    return json.dumps(draw(lied(record))).encode()


@st.composite
def safetensors_file(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with lies in its header, or damaged."""
    if draw(st.booleans()):
        return draw(damaged(data))
    (length,) = struct.unpack("<Q", data[:8])
    header = draw(json_file(json.loads(data[8 : 8 + length])))
    wrong = draw(st.sampled_from((0, 0, 0, 1, -1, 1 << 40)))
    return struct.pack("<Q", max(0, len(header) + wrong)) + header + data[8 + length :]


def fields_of(message: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """Every (message, field) that is set below a protobuf message."""
    found = []
    for field, value in message.ListFields():
        found.append((message, field))
        if field.message_type is not None and depth < 8:
            for part in (value,) if hasattr(value, "ListFields") else value:
                found += fields_of(part, depth + 1)
    return found


_NUMBERS = (0, 1, -1, 2, 7, 99, 1 << 31, (1 << 62) + 1, -(1 << 62))
_WORDS = (
    "",
    "x",
    "......",
    "../../etc/passwd",
    "/etc/passwd",
    "W",
    "y",
    "\x1b[2J",
    "Relu",
    "trt",
    "n" * 5000,
)


@st.composite
def onnx_file(draw: st.DrawFn, model: Any) -> bytes:
    """An ONNX model with one to three fields of another value, doubled or left out, or damaged."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged(model.SerializeToString()))
    made = copy.deepcopy(model)
    for _ in range(draw(st.integers(1, 3))):
        message, field = draw(st.sampled_from(fields_of(made)))
        repeated, value = field.is_repeated, getattr(message, field.name)
        if field.message_type is not None or draw(st.integers(0, 5)) == 0:
            if repeated and len(value) and draw(st.booleans()):
                value.append(value[0])
            else:
                message.ClearField(field.name)
            continue
        new = _new(draw, field)
        try:
            if repeated:
                value[draw(st.integers(0, len(value) - 1))] = new
            else:
                setattr(message, field.name, new)
        except (ValueError, TypeError):  # out of the range of that field
            message.ClearField(field.name)
    return bytes(made.SerializeToString())


def _new(draw: st.DrawFn, field: Any) -> Any:
    if field.type == field.TYPE_STRING:
        return draw(st.sampled_from(_WORDS))
    if field.type == field.TYPE_BYTES:
        return draw(st.sampled_from((b"", b"\xff\xfe", b"......", b"\0" * 64)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return draw(st.sampled_from((0.0, -1.0, float("nan"), float("inf"), 1e30)))
    return draw(st.sampled_from(_NUMBERS))
