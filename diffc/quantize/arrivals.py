"""Weights on their way to a device: on a GPU, those of the next layers come while one computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from diffc.quantize.staging import Staging

WINDOW = 256 << 20
"""Bytes of weights that are on their way to a GPU while others compute."""
THREADS = 2
"""Threads that copy: together 20 GB/s on an H200, and more of them are no faster."""
Copy = Callable[[Tensor], Tensor]
"""From a tensor on the CPU to one of its own memory on the device."""
Make = Callable[[str, Copy], Tensor]
"""The weight of the layer of a path on the device, copied there by what is given."""


@dataclass
class _Arrived:
    """A weight on the device, and on a GPU the event after which it is whole."""

    weight: Tensor
    event: Any = None


class Arrivals:
    """Gives the weights that `make` makes, and has those of the next layers made meanwhile where there is a GPU."""

    def __init__(self, device: torch.device, make: Make) -> None:
        self._device, self._make = device, make
        self._coming: dict[str, Future[_Arrived]] = {}
        self._used: deque[tuple[Any, int]] = deque()
        self._unfinished, self._lock, self._waiting = 0, threading.Lock(), threading.Lock()
        self.on_gpu = device.type == "cuda"
        self.window, self.waited = WINDOW, 0.0
        if self.on_gpu:
            self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self.staging = Staging(device, self._side)
            self._pool = ThreadPoolExecutor(THREADS, "weights")

    def take(self, path: str) -> Tensor:
        """The weight of a layer, which what is launched from now on waits for."""
        begun = perf_counter()
        future = self._coming.pop(path, None)
        arrived = self._load_soon(path) if future is None else future.result()
        self.waited += perf_counter() - begun
        if arrived.event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived.event)
            arrived.weight.record_stream(current)
        return arrived.weight

    def send(self, paths: Iterable[str]) -> None:
        """Have these weights made, unless they are coming already."""
        for path in paths if self.on_gpu else ():
            if path not in self._coming:
                self._coming[path] = self._pool.submit(self._load_soon, path)

    def used(self, size: int) -> None:
        """A layer was launched that does not need its weight of `size` bytes any more afterwards."""
        if self.on_gpu and size:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            with self._lock:
                self._used.append((event, size))
                self._unfinished += size

    def forget(self) -> None:
        """Wait for what is coming, and drop it."""
        while self._coming:
            future = self._coming.popitem()[1]
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        """End the threads."""
        if self.on_gpu:
            self._pool.shutdown(cancel_futures=True)
            self.staging.close()
        self._coming.clear()

    def _load_soon(self, path: str) -> _Arrived:
        """Load a weight as soon as earlier layers are done with their own, so that memory stays bounded."""
        with self._waiting:  # one thread: the others would find nothing to wait for
            while self._unfinished > self.window:
                event, size = self._used.popleft()
                event.synchronize()
                with self._lock:
                    self._unfinished -= size
        return self._load(path)

    def _load(self, path: str) -> _Arrived:
        if not self.on_gpu:
            return _Arrived(self._make(path, torch.clone))  # aligned as torch aligns
        with torch.cuda.stream(self._side):
            weight = self._make(path, self.staging.copy)
        return _Arrived(weight, self._side.record_event())
