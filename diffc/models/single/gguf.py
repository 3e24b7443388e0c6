"""Reads GGUF files (ggml-org/ggml, docs/gguf.md): which tensors there are and where; no value is read.

A file is: "GGUF", version, counts, key-value pairs, one line for each tensor, and the tensors, each at a multiple of
the alignment. Shapes are written last axis first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from onnx import TensorProto

from passes.base import PassError
from passes.files.bounded import regular
from passes.weights.gguf_blocks import BLOCKS
from passes.weights.recipe import Recipe, Source
from passes.weights.stored import of_gguf

_PLAIN = {
    0: int(TensorProto.FLOAT),
    1: int(TensorProto.FLOAT16),
    24: int(TensorProto.INT8),
    26: int(TensorProto.INT32),
    27: int(TensorProto.INT64),
    28: int(TensorProto.DOUBLE),
    30: int(TensorProto.BFLOAT16),
}
_BYTES = {0: 4, 1: 2, 24: 1, 26: 4, 27: 8, 28: 8, 30: 2}
_KINDS = {block.number: name for name, block in BLOCKS.items()}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4
_MOST = 1 << 20
"""Entries that a header may have: more is damage."""


def gguf_tensors(path: Path) -> tuple[dict[str, Recipe], dict[str, str], dict[str, str]]:
    """Every tensor in float32 or its own type, the key-value pairs as text, and the block type of quantized tensors.

    Raises PassError for a file that is cut off, of an older version, or has a block type that is not known.
    """
    size = regular(path).st_size
    with path.open("rb") as file:
        try:
            read = _reader(file)
            if file.read(4) != b"GGUF":
                raise PassError(f"{path} is not a GGUF file. Fix: copy or download it again")
            version = read("I")
            if version not in (2, 3):
                raise PassError(
                    f"{path} is GGUF version {version}; diffc reads 2 and 3"
                    ". Fix: convert it with a newer llama.cpp"
                )
            counts = read("Q"), read("Q")
            if max(counts) > _MOST:
                raise PassError(
                    f"{path} is damaged: {counts[0]} tensors and {counts[1]} entries"
                    ". Fix: copy or download it again"
                )
            pairs = dict(_pair(file, read) for _ in range(counts[1]))
            entries = [_entry(file, read) for _ in range(counts[0])]
        except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
            raise PassError(
                f"{path} is damaged: its header does not parse ({error}). Fix: copy or download it again"
            ) from error
        step = pairs.get("general.alignment", 32)
        if type(step) is not int or not 0 < step <= _MOST:
            raise PassError(
                f"{path} is damaged: its alignment is {str(step)[:40]!r}. Fix: copy or download it again"
            )
        start = file.tell() + -file.tell() % step
    tensors = {name: _tensor(path, name, shape, kind, start + at, size) for name, shape, kind, at in entries}
    original = {k.removeprefix("comfy.gguf.orig_shape."): v for k, v in pairs.items() if "orig_shape." in k}
    for name, shape in original.items():
        if name in tensors and isinstance(shape, list) and all(type(n) is int for n in shape):
            tensors[name] = tensors[name].reshape(tuple(shape))
    kinds = {name: _KINDS[kind] for name, _, kind, _ in entries if kind in _KINDS}
    return tensors, {key: str(value) for key, value in pairs.items()}, kinds


def _reader(file: IO[bytes]) -> Callable[[str], Any]:
    def read(kind: str) -> Any:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0]

    return read


def _text(file: IO[bytes], read: Callable[[str], Any]) -> str:
    length = read("Q")
    if length > 1 << 26:
        raise struct.error(f"a text of {length} bytes")
    data = file.read(length)
    if len(data) < length:
        raise struct.error(f"a text of {length} bytes, of which {len(data)} are there")
    return data.decode("utf-8")


def _pair(file: IO[bytes], read: Callable[[str], Any]) -> tuple[str, Any]:
    key = _text(file, read)
    return key, _value(file, read, read("I"))


def _value(file: IO[bytes], read: Callable[[str], Any], kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
        return _text(file, read)
    if kind == _ARRAY:
        inner, count = read("I"), read("Q")
        if count > _MOST or depth > _DEEPEST:
            raise struct.error(f"a list of {count} values, {depth} lists deep")
        return [_value(file, read, inner, depth + 1) for _ in range(count)]
    return read(_SCALARS[kind])


def _entry(file: IO[bytes], read: Callable[[str], Any]) -> tuple[str, tuple[int, ...], int, int]:
    name, axes = _text(file, read), read("I")
    if axes > 8:
        raise struct.error(f"a tensor of {axes} axes")
    shape = tuple(read("Q") for _ in range(axes))
    if math.prod(shape) >= 1 << 62:
        raise struct.error(f"a tensor of {math.prod(shape)} values")
    return name, shape[::-1], read("I"), read("Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> Recipe:
    if kind in _PLAIN:
        stored, dtype, length = shape, _PLAIN[kind], math.prod(shape) * _BYTES[kind]
    elif kind in _KINDS:
        block = BLOCKS[_KINDS[kind]]
        if not shape or shape[-1] % block.elements:
            raise PassError(
                f"{path}: tensor {name!r} {list(shape)} is not whole blocks of {block.elements}"
                ". Fix: copy or download it again"
            )
        width = shape[-1] // block.elements * block.nbytes
        stored, dtype = (*shape[:-1], width), int(TensorProto.UINT8)
        length = math.prod(stored)
    else:
        known = ", ".join(BLOCKS)
        raise PassError(
            f"{path}: tensor {name!r} has block type {kind}, which diffc does not read. Known: {known}"
            ". Fix: convert it to one that is known"
        )
    if offset + length > size:
        raise PassError(
            f"{path} is cut off: tensor {name!r} ends at byte {offset + length} of {size}"
            ". Fix: copy or download it again"
        )
    bytes_ = Recipe.of_source(Source("raw", str(path.absolute()), dtype, stored, name, offset, length))
    return bytes_ if kind in _PLAIN else of_gguf(bytes_, _KINDS[kind], shape[-1])
