"""Random weights, gigabytes of them: written in bounded memory, every value fixed by seed, tensor and position.

A value is an entry of a table of 65,536 quantiles of its distribution, in the stored type; a 16-bit number of Philox
says which. That generator is counter-based: parts are made in any order, on every core, at memory speed.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from diffc.errors import DiffcError
from passes.weights.evaluate import THREADS
from passes.weights.safetensors_writer import safetensors_header

Array = npt.NDArray[Any]
TYPES = {"float16": ("F16", np.float16), "bfloat16": ("BF16", ml_dtypes.bfloat16)}
_PART = 1 << 22
"""Values of a part; each part of a tensor has its own counter."""
_PIECE = 1 << 17


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: its name, shape and type ("float16" or "bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.size * 2


def distribution(tensor: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values, about those of trained models.

    Matrices: 0 and 1/sqrt(inputs), kept within 0.02 to 0.03. Scales of norms: 1 and 0.1. Biases: 0 and 0.02.
    Tables of positions, which are sines: 0 and 0.7.
    """
    if tensor.name.startswith("pos_embed."):
        return 0.0, math.sqrt(0.5)
    if len(tensor.shape) > 1:
        return 0.0, min(0.03, max(0.02, 1 / math.sqrt(math.prod(tensor.shape[1:]))))
    return (1.0, 0.1) if tensor.name.endswith(".weight") else (0.0, 0.02)


@lru_cache(maxsize=1)
def _quantiles() -> npt.NDArray[np.float64]:
    """65,536 numbers that stand for the standard normal distribution: its quantiles at (i + 1/2) / 65536."""
    half = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768)]
    return np.array([*half, *(-x for x in reversed(half))])


@lru_cache(maxsize=64)
def _table(mean: float, std: float, dtype: str) -> npt.NDArray[np.uint16]:
    return (mean + std * _quantiles()).astype(np.float32).astype(TYPES[dtype][1]).view(np.uint16)


def values(tensor: Tensor, seed: str) -> Iterator[Array]:
    """All values of a tensor, flat and in parts, in its type."""
    for part in range(-(-tensor.size // _PART)):
        yield _part(tensor, seed, part).view(TYPES[tensor.dtype][1])


def _part(tensor: Tensor, seed: str, part: int) -> npt.NDArray[np.uint16]:
    """The codes of the part-th 4 Mi values."""
    digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
    # A part draws fewer than 2**64 numbers, so parts, which differ in the highest word, have none in common.
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=[0, 0, 0, part])
    table = _table(*distribution(tensor), tensor.dtype)
    codes = np.empty(min(_PART, tensor.size - part * _PART), np.uint16)
    for begin in range(0, codes.size, _PIECE):
        piece = codes[begin : begin + _PIECE]
        numbers = stream.random_raw(-(-piece.size // 4)).astype("<u8", copy=False).view("<u2")
        np.take(table, numbers[: piece.size], out=piece, mode="clip")
    return codes


def check_room(folder: Path, needed: int) -> None:
    """Raise DiffcError when the disk of `folder` has no room for `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01 + (1 << 24):
        raise DiffcError(
            f"no room on the disk of {folder.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free",
            fix="free some space, or name a folder on another disk",
        )


def write_safetensors(path: Path, tensors: Sequence[Tensor], seed: str) -> Iterator[int]:
    """Write a safetensors file, and yield the bytes of each part when it is written."""
    with path.open("wb") as file:
        entries = [(t.name, TYPES[t.dtype][0], t.shape, t.nbytes) for t in tensors]
        file.write(safetensors_header(entries, {"format": "pt"}))
        for data in _made(tensors, seed):
            file.write(data)
            yield data.nbytes


def _made(tensors: Sequence[Tensor], seed: str) -> Iterator[memoryview]:
    """The bytes of all parts in order; a few parts are made ahead on other threads."""
    waiting: deque[Future[npt.NDArray[np.uint16]]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for tensor in tensors:
            for part in range(-(-tensor.size // _PART)):
                if len(waiting) >= 2 * THREADS:
                    yield waiting.popleft().result().data
                waiting.append(pool.submit(_part, tensor, seed, part))
        while waiting:
            yield waiting.popleft().result().data
    finally:
        pool.shutdown(cancel_futures=True)
