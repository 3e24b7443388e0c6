"""Readers: from a recipe's source to an array that maps the file, so that nothing is copied before it is used."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from passes.base import PassError
from passes.files.bounded import parse_object, regular
from passes.weights.finite import check_finite
from passes.weights.recipe import Array, Recipe, Source

# The element types of the safetensors format that a diffusion checkpoint uses.
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header, the format's own limit."""
_METADATA, _AGAIN = "__metadata__", "Fix: download the file again"
_MEMORY: dict[str, Array | Callable[[], Array]] = {}
_LOOKED_AT: set[tuple[Source, int, int]] = set()
"""Tensors whose values are numbers, each with the time and size of its file then."""


def np_dtype(dtype: int) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) type of an onnx.TensorProto element type."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype))


def onnx_dtype(dtype: np.dtype[Any] | type[Any]) -> int:
    """The onnx.TensorProto element type of a numpy (or ml_dtypes) type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


@lru_cache(maxsize=256)
def _header(path: str, mtime_ns: int, size: int) -> tuple[int, dict[str, dict[str, Any]]]:
    del mtime_ns  # part of the cache key: a changed file is read again
    with Path(path).open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size or length > MAX_HEADER:
            raise PassError(f"{path} is not a safetensors file, or is cut off ({size} bytes). {_AGAIN}")
        try:
            header = parse_object(file.read(length), f"{path}: the safetensors header is corrupt: it")
        except PassError as error:
            raise PassError(f"{error}. {_AGAIN}") from error
    return 8 + length, header


def safetensors_source(path: Path, key: str) -> Source:
    """The source for tensor `key` of a safetensors file. Raises PassError when it is not there."""
    stat = path.stat()
    start, header = _header(str(path), stat.st_mtime_ns, stat.st_size)
    if key not in header or key == _METADATA:
        raise PassError(f"{path} has no tensor {key!r}. Fix: take weights and model of one release")
    source = _source(path, key, header[key], start)
    if source.offset + source.length > stat.st_size:
        end = source.offset + source.length
        raise PassError(
            f"{path} is cut off: tensor {key!r} ends at byte {end} of {stat.st_size}. Fix: download it again"
        )
    return source


def safetensors_tensors(path: Path) -> dict[str, Recipe]:
    """Every tensor of a safetensors file by its name, in the order of the header; no tensor is read.

    Raises PassError when the header is cut off or corrupt, or has a type of element that recipes lack. That the
    data are all there is found out when they are read.
    """
    stat = regular(path)
    start, header = _header(str(path), stat.st_mtime_ns, stat.st_size)
    entries = ((key, entry) for key, entry in header.items() if key != _METADATA)
    return {key: Recipe.of_source(_source(path, key, entry, start)) for key, entry in entries}


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The texts that the header of a safetensors file keeps beside its tensors; empty where it has none.

    Raises PassError when the header is cut off or corrupt.
    """
    stat = regular(path)
    found = _header(str(path), stat.st_mtime_ns, stat.st_size)[1].get(_METADATA)
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _source(path: Path, key: str, entry: Any, start: int) -> Source:
    """The source that one entry of a header describes; the data begin at byte `start` of the file."""
    try:
        (begin, end), shape, name = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise _corrupt(path, key, "it has no type, shape and place") from error
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (begin, end, *shape)):
        raise _corrupt(path, key, "its shape and place are not whole numbers from 0 on")
    dtype = SAFETENSORS_DTYPES.get(str(name))
    if dtype is None:
        known = ", ".join(SAFETENSORS_DTYPES)
        raise PassError(f"{path}: tensor {key!r} has the unsupported type {str(name)[:40]!r}. Known: {known}")
    if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
        raise _corrupt(path, key, f"{end - begin} bytes do not hold {list(shape)} of {name}")
    # Not resolved: in the cache of the hub a link has the name that a person knows, and its file a hash.
    return Source("raw", str(path.absolute()), onnx_dtype(dtype), shape, key, start + begin, end - begin)


def _corrupt(path: Path, key: str, why: str) -> PassError:
    return PassError(f"{path}: the safetensors header is corrupt (tensor {key!r}: {why}). {_AGAIN}")


def _read_raw(source: Source) -> Array:
    if source.length == 0:
        return np.zeros(source.shape, np_dtype(source.dtype))
    mapped = np.memmap(whole_file(source), np.uint8, "r", source.offset, (source.length,))
    data = np.asarray(mapped)  # a plain view: each slice of a memmap runs Python code, which threads wait for
    return as_array(data, source.dtype, source.shape)


def whole_file(source: Source) -> Path:
    """The file of a source. Raises PassError when it is gone, or too short for the tensor."""
    path = Path(source.path)
    if not path.is_file() or path.stat().st_size < source.offset + source.length:
        raise PassError(
            f"{source.path} is missing or cut off: tensor {source.key!r} cannot be read"
            ". Fix: download it again"
        )
    return path


def as_array(data: Array, dtype: int, shape: tuple[int, ...]) -> Array:
    """Bytes as ONNX stores them (4-bit types two to a byte, low nibble first) -> an array of that type."""
    target = np_dtype(dtype)
    if dtype in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1):
        nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
        if dtype == onnx.TensorProto.INT4:
            return (((nibbles ^ 8).astype(np.int8)) - 8).astype(target).reshape(shape)
        return nibbles.astype(np.uint8).view(target).reshape(shape)
    return data.view(target).reshape(shape)


def _read_inline(source: Source) -> Array:
    data = np.frombuffer(bytes.fromhex(source.key), np_dtype(source.dtype))
    return data.reshape(source.shape)


def _read_memory(source: Source) -> Array:
    if source.key not in _MEMORY:
        raise PassError(
            "a weight kept in memory is gone: the model was loaded in another process"
            ". Fix: load the model again"
        )
    kept = _MEMORY[source.key]
    array = kept() if callable(kept) else kept
    # Weights of equal bytes share a key: zeros of any shape, and of types of one size.
    return (
        array
        if array.dtype == np_dtype(source.dtype) and array.shape == source.shape
        else _as_source(array, source)
    )


def _as_source(array: Array, source: Source) -> Array:
    """The bytes of `array` in the type and shape of `source`."""
    return np.ascontiguousarray(array).reshape(-1).view(np_dtype(source.dtype)).reshape(source.shape)


def keep(array: Array) -> Recipe:
    """A recipe over an array that stays in this process's memory (weights embedded in an .onnx file)."""
    key = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
    _MEMORY[key] = array
    return Recipe.of_source(Source("memory", "", onnx_dtype(array.dtype), array.shape, key))


def keep_lazily(
    key: str, load: Callable[[], Array], dtype: np.dtype[Any] | type[Any], shape: tuple[int, ...]
) -> Recipe:
    """A recipe over values that `load` gives whenever they are read; `key` is the SHA-256 of their bytes.

    The newest array of a key is read: an earlier one may have been written to since.
    """
    _MEMORY[key] = load
    return Recipe.of_source(Source("memory", "", onnx_dtype(dtype), shape, key))


@contextmanager
def memory_of_its_own() -> Iterator[None]:
    """Arrays that are kept while this is open are let go at its end; recipes over them are read no more."""
    earlier = dict(_MEMORY)
    try:
        yield
    finally:
        _MEMORY.clear()
        _MEMORY.update(earlier)


READERS: dict[str, Callable[[Source], Array]] = {
    "raw": _read_raw,
    "inline": _read_inline,
    "memory": _read_memory,
}


def read(source: Source) -> Array:
    """The array of a source, mapped where it is a file.

    Raises PassError when the file is short or gone, and for NaN and infinity.
    """
    if source.kind not in READERS:
        raise PassError(f"no reader for weights of kind {source.kind!r}. Known: {', '.join(READERS)}")
    array = READERS[source.kind](source)
    look_at(array, source)
    return array


def look_at(array: Array, source: Source) -> None:
    """`check_finite`, which takes a core 7 GB/s: once for a tensor of a file, for as long as the file is the same."""
    if source.kind != "raw" or source.length == 0:
        check_finite(array, source)
        return
    stat = Path(source.path).stat()
    seen = (source, stat.st_mtime_ns, stat.st_size)
    if seen not in _LOOKED_AT:
        check_finite(array, source)
        _LOOKED_AT.add(seen)
