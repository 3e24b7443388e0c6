"""Copies weights from CPU memory or mapped files to a GPU through pinned buffers.

A copy from memory that the system may move (a mapped file is such) goes through a buffer of the driver's, at 8 GB/s on
an H200. Here whoever copies fills a pinned buffer, 14 GB/s, while the GPU empties another. Python is run as little as
possible: what launches the layers has to wait for it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

BUFFERS = 4
PIECE = 32 << 20
"""Bytes of a buffer, which are copied at a time."""


@dataclass
class Spent:
    """Where the time of copies went: seconds of all threads together."""

    bytes: int = 0
    filling: float = 0.0
    waiting_for_bus: float = 0.0


@dataclass
class _Buffer:
    """Memory that is filled anew when `sent`, an event of CUDA, says that the GPU has what was in it."""

    memory: Tensor
    sent: Any

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.sent is not None:
            self.sent.synchronize()


@dataclass
class Staging:
    """Pinned buffers for copies to `device` on the CUDA stream `side`, for any number of threads.

    `side` None: `device` is the CPU, and the same pieces go through plain buffers.
    """

    device: torch.device
    side: Any = None
    piece: int = PIECE
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        self._lock, self._made = threading.Lock(), False

    def copy(self, stored: Tensor) -> Tensor:
        """`stored`, on the CPU, as a tensor of its own on the device; on a GPU, for what `side` does from here on."""
        self._make_buffers()
        with torch.cuda.stream(self.side):  # None: no stream at all
            target = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
            source, result = _bytes_of(stored), _bytes_of(target)
            for at in range(0, len(source), self.piece):
                self._send(source[at : at + self.piece], result[at : at + self.piece])
        return target

    def close(self) -> None:
        """Let the buffers go, when the GPU has what is in them."""
        while not self._free.empty():
            self._free.get().wait()

    def _make_buffers(self) -> None:
        with self._lock:
            for _ in range(0 if self._made else BUFFERS):
                self._free.put(_buffer(self.piece, pinned=self.side is not None))
            self._made = True

    def _send(self, source: Tensor, target: Tensor) -> None:
        begun = perf_counter()
        buffer = self._free.get()
        try:
            buffer.wait()
            filling = perf_counter()
            filled = buffer.memory[: len(source)].copy_(source)
            self.spent.waiting_for_bus += filling - begun
            self.spent.filling += perf_counter() - filling
            self.spent.bytes += len(source)
            target.copy_(filled, non_blocking=True)
            if buffer.sent is not None:
                buffer.sent.record(self.side)
        finally:
            self._free.put(buffer)


def _buffer(size: int, *, pinned: bool) -> _Buffer:
    memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    return _Buffer(memory, torch.cuda.Event(blocking=True) if pinned else None)  # type: ignore[no-untyped-call]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
