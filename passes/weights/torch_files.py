"""Tensors in files of `torch.save`, such as ModelOpt's checkpoints, as places in the file: without torch, nothing read.

Such a file is a zip archive that compresses nothing: `data.pkl` says which tensors there are, `data/KEY` holds the
bytes of a storage. The pickle is read by an unpickler that knows tensors and plain containers, and makes an inert
object of everything else: no code of the file runs.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from passes.base import PassError
from passes.files.bounded import regular
from passes.weights.recipe import Recipe, Source
from passes.weights.sources import onnx_dtype

_DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "",
}


@dataclass(frozen=True)
class _Type:
    """An element type of torch, named by itself or by a class of storage; "" where the tensor names it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands for any object that is not a tensor: takes what the pickle gives it, and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, value: object) -> None: ...
    def extend(self, values: object) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in _REBUILD:
            return _REBUILD[name]
        if module == "torch.storage" or module == "torch":
            if name in _STORAGES:
                return _Type(_STORAGES[name])
            if name in _DTYPES:
                return _Type(name)
        return _Inert

    def persistent_load(self, pid: Any, /) -> Any:
        kind, storage, key, *_ = pid
        if kind != "storage" or not isinstance(storage, _Type):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return _Storage(str(key), storage.name)


def _tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, tuple(shape), tuple(stride))


def _typed_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    _: object,
    __: object,
    dtype: _Type,
) -> _Tensor:
    return _Tensor(storage, dtype.name, offset, tuple(shape), tuple(stride))


_REBUILD: dict[str, Any] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _typed_tensor,
    "_rebuild_parameter": lambda data, *_: data,
}


def torch_tensors(path: Path) -> dict[str, Recipe]:
    """Every tensor of a file that `torch.save` wrote, by its keys in nested dicts and lists, joined with dots.

    A tensor whose elements lie in another order is a transposed one. Raises PassError for a file of another kind,
    one that is cut off, and for a tensor that is a view with gaps.
    """
    stat = regular(path)
    return dict(_tensors(path.resolve(), stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=8)
def _tensors(path: Path, mtime_ns: int, size: int) -> dict[str, Recipe]:
    del mtime_ns, size  # part of the cache key: a changed file is read again
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            infos = {info.filename: info for info in archive.infolist()}
            root = next(name for name in infos if name.endswith("/data.pkl")).removesuffix("data.pkl")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in infos else b"little"
            data = _pickle(archive, infos[f"{root}data.pkl"])
            content = _Unpickler(BytesIO(data)).load()
            if order != b"little":
                raise PassError(f"{path} was written on a big-endian machine. Fix: save it again on another")
            found = dict(_walk(content, "", (), iter(range(_SHARED * len(data)))))
            places = {
                key: _place(file, infos, f"{root}data/{key}", path)
                for key in {tensor.storage.key for tensor in found.values()}
            }
    except (
        *_DAMAGE,
        zipfile.BadZipFile,
        StopIteration,
    ) as error:
        fix = "Fix: copy it again, or save it with a torch of 1.6 or later"
        raise PassError(f"{path} is damaged, or no file of torch.save ({_said(error)}). {fix}") from error
    return {name: _recipe(path, name, tensor, places[tensor.storage.key]) for name, tensor in found.items()}


_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError),
    *(
        RecursionError,
        MemoryError,
        NotImplementedError,
        zlib.error,
        struct.error,
        ImportError,
        RuntimeError,
        OSError,
    ),
)
"""What an unpickler raises on bytes that no torch.save wrote."""
_LARGEST_PICKLE = 256 << 20
"""Bytes of data.pkl: names, shapes and settings of a checkpoint, without its tensors."""
_DEPTH = 100
_SHARED = 8
"""Items of all dictionaries and lists for a byte of data.pkl: one takes a byte, and what is in several places counts
in each. Forty lists that hold the next one twice have 2^40."""


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}" if str(error) else type(error).__name__


def _pickle(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of data.pkl. Raises ValueError for more than it can have, as a compressed bomb has."""
    if info.file_size > _LARGEST_PICKLE or (
        info.file_size > 1 << 20 and info.file_size > 100 * info.compress_size
    ):
        raise ValueError(f"data.pkl has {info.file_size} bytes")
    return archive.read(info)


def _walk(
    value: object, name: str, around: tuple[int, ...], left: Iterator[int]
) -> Iterator[tuple[str, _Tensor]]:
    if next(left, None) is None:
        raise ValueError("its lists hold each other more often than a file of this size can")
    if id(value) in around or len(around) > _DEPTH:
        raise ValueError("its dictionaries hold themselves, or are nested too deep")
    if isinstance(value, _Tensor):
        yield name, value
        return
    items = (
        value.items()
        if isinstance(value, Mapping)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    for key, item in items:
        yield from _walk(item, f"{name}.{key}" if name else str(key), (*around, id(value)), left)


def _place(file: IO[bytes], infos: Mapping[str, zipfile.ZipInfo], name: str, path: Path) -> tuple[int, int]:
    """Where the bytes of a stored member begin in the file, and how many they are."""
    info = infos[name]
    if info.compress_type != zipfile.ZIP_STORED:
        raise PassError(
            f"{path}: {name} is compressed and cannot be mapped. Fix: save the file with torch.save"
        )
    file.seek(info.header_offset)
    header = file.read(30)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + 30 + lengths, info.file_size


def _recipe(path: Path, name: str, tensor: _Tensor, place: tuple[int, int]) -> Recipe:
    if tensor.dtype not in _DTYPES:
        raise PassError(
            f"{path}: tensor {name!r} has the unsupported type {tensor.dtype or 'untyped'}"
            ". Fix: save it in a type that is known"
        )
    numbers = (tensor.offset, *tensor.shape, *tensor.stride)
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers) or len(tensor.shape) != len(
        tensor.stride
    ):
        raise PassError(
            f"{path} is damaged: tensor {name!r} has a shape {tensor.shape!r:.80}. Fix: copy it again"
        )
    dtype = np.dtype(_DTYPES[tensor.dtype])
    order = sorted(range(len(tensor.shape)), key=lambda i: (-tensor.stride[i], i))
    shape = tuple(tensor.shape[i] for i in order)
    dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if any(n > 1 and tensor.stride[i] != s for i, n, s in zip(order, shape, dense, strict=True)):
        raise PassError(
            f"{path}: tensor {name!r} is a view with gaps (stride {tensor.stride}). Fix: save its clone()"
        )
    begin, length = tensor.offset * dtype.itemsize, math.prod(shape) * dtype.itemsize
    if begin + length > place[1]:
        raise PassError(
            f"{path}: tensor {name!r} ends after its storage of {place[1]} bytes."
            " Fix: save or copy the file again"
        )
    source = Source("raw", str(path), onnx_dtype(dtype), shape, name, place[0] + begin, length)
    return Recipe.of_source(source).transpose(tuple(order.index(i) for i in range(len(order))))
