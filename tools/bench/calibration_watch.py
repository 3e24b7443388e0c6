"""What `tools.bench.calibration` looks at while a calibration runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffc.compile import bounded
from diffc.progress import Silent
from diffc.quantize import arrivals
from diffc.quantize.stream import WeightStream

GB = 1e9


class Timed(Silent):
    """Notes when each step of the calibration ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep what calibration says of itself."""
        self.notes.append(text)

    @property
    def seconds(self) -> float | None:
        """Seconds a step, the median; the first is left out."""
        steps = [(t - s) / (done - before) for (before, s), (done, t) in pairwise(self.ends) if done > before]
        return round(float(np.median(steps)), 3) if steps else None

    @contextmanager
    def stage(self, title: str) -> Iterator[Any]:
        """Watch the stage that calibrates."""
        yield self.step if title.startswith("calibrate") else lambda done, total: None

    def step(self, done: int, total: int) -> None:
        """A step is over when the card is done with it."""
        del total
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((done, time.perf_counter()))


class HostPeak(threading.Thread):
    """The most memory without a file behind it that this process holds, sampled every 50 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.ended = 0, threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until `ended`."""
        while not self.ended.wait(0.05):
            self.peak = max(self.peak, anonymous_memory())


def anonymous_memory() -> int:
    """Bytes of this process in memory that have no file behind them, as far as the system tells."""
    import psutil

    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    told = next((line for line in lines if line.startswith("RssAnon:")), None)
    if told is not None:
        return int(told.split()[1]) * 1024
    found = psutil.Process().memory_info()
    return int(found.rss - getattr(found, "shared", 0))


def watched(threads: int) -> list[WeightStream]:
    """The streams that calibration makes from here on, the backbone's last, with so many threads for copies."""
    made: list[WeightStream] = []

    class Watched(WeightStream):
        """One that is noted."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    bounded.WeightStream = Watched  # type: ignore[misc]
    arrivals.THREADS = threads
    return made


def spent_by(stream: WeightStream) -> dict[str, float]:
    """Where the time of its copies went."""
    spent = stream.arrivals.staging.spent
    return {
        "copied_GB": round(spent.bytes / GB, 1),
        "layers_waited_s": round(stream.arrivals.waited, 2),
        "window_MB": stream.arrivals.window >> 20,
        "filling_s": round(spent.filling, 2),
        "waiting_for_bus_s": round(spent.waiting_for_bus, 2),
    }
