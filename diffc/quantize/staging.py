"""Copies weights from CPU memory or mapped files to a GPU at the speed of its bus.

A copy from memory that the system may move (a mapped file is such) goes through a buffer of the driver's, by one
thread. Here several threads fill pinned buffers, which the GPU empties meanwhile.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

THREADS = min(8, os.cpu_count() or 1)
PIECE = 8 << 20
"""Bytes that are copied at a time; there are two buffers of this size for each thread."""


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
    """Pinned buffers and the threads that fill them, for copies to `device` on the CUDA stream `side`.

    `side` None: `device` is the CPU, and the same pieces go through plain buffers.
    """

    device: torch.device
    side: Any = None
    threads: int = THREADS
    piece: int = PIECE
    spent: Spent = field(default_factory=Spent)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.threads, "copies")
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        self._lock, self._made = threading.Lock(), False

    def copy(self, stored: Tensor) -> Tensor:
        """`stored`, on the CPU, as a tensor of its own on the device; on a GPU, for what `side` does from here on."""
        with torch.cuda.stream(self.side):  # None: no stream at all
            target = torch.empty(stored.shape, dtype=stored.dtype, device=self.device)
        self._make_buffers()
        source, result = _bytes_of(stored), _bytes_of(target)
        pieces = [slice(at, at + self.piece) for at in range(0, len(source), self.piece)]
        sent = [self._pool.submit(self._send, source[piece], result[piece]) for piece in pieces[1:]]
        for piece in pieces[:1]:  # a small tensor is not worth another thread
            self._send(source[piece], result[piece])
        for done in sent:
            done.result()
        return target

    def close(self) -> None:
        """End the threads and let the buffers go, when the GPU has what is in them."""
        self._pool.shutdown(cancel_futures=True)
        while not self._free.empty():
            self._free.get().wait()

    def _make_buffers(self) -> None:
        with self._lock:
            for _ in range(0 if self._made else 2 * self.threads):
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
            with torch.cuda.stream(self.side):
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
