"""A reporter that keeps how long each stage took and how much memory the process held, beside showing them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from diffc.artifact.records import save_run
from diffc.progress import Reporter, Update, untitled

if TYPE_CHECKING:
    from diffc.backends.tensorrt.build import EngineReport

_EVERY = 0.05
"""Seconds between two looks at the memory."""


@dataclass
class Recorded:
    """Passes everything on to `ui`; `stages` has what each took, as `diffc.artifact.records.Stage`."""

    ui: Reporter
    stages: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, title: str) -> Iterator[Update]:
        """A stage of `ui`, timed."""
        started = time.perf_counter()
        with _held() as held, self.ui.stage(title) as update:
            yield update
        seconds = time.perf_counter() - started
        self.stages.append({"title": untitled(title), "seconds": round(seconds, 4), "memory": max(held)})

    def note(self, text: str) -> None:
        """A line that stays."""
        self.ui.note(text)

    def save(
        self, folder: Path, engines: Sequence[EngineReport], request: Mapping[str, Any] | None = None
    ) -> None:
        """Write records/run.json into the `folder` of an artifact that is being made.

        `request`: what was asked for, where the manifest has no place for it.
        """
        builders = [
            {"title": f"engines/{e.path.name}", "seconds": round(e.seconds, 4), "memory": e.peak_rss}
            for e in engines
        ]
        seconds = round(time.perf_counter() - self.begun, 4)
        save_run(folder, seconds, self.stages, builders, request)


@contextmanager
def _held() -> Iterator[list[int]]:
    """The bytes that this process holds, looked at again and again while the block runs."""
    process, stop = psutil.Process(), threading.Event()
    held = [process.memory_info().rss]

    def look() -> None:
        while not stop.wait(_EVERY):
            held[0] = max(held[0], process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield held
    finally:
        stop.set()
        watcher.join()
        held[0] = max(held[0], process.memory_info().rss)
