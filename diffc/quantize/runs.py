"""How far a calibration is, over all runs of its prompts, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[int, int], None]
"""Called after every denoising step with steps done and steps in all."""


@dataclass
class Passes:
    """A Progress over the passes of a method that runs the prompts more than once."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, step: int, steps: int) -> None:
        """Steps of the current pass -> steps of all of them."""
        self.progress(self.done * steps + step, max(self.total, self.done + 1) * steps)


@dataclass
class Estimate:
    """A Progress that says once, after a few steps, how long all of them take."""

    progress: Progress
    note: Callable[[str], None]
    _begun: tuple[float, int] | None = None
    _told: bool = False

    def __call__(self, step: int, steps: int) -> None:
        """The first step counts for nothing: it loads and compiles what the others use."""
        self.progress(step, steps)
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now, step
        elif not self._told and step - self._begun[1] >= _TIMED_STEPS:
            self._told = True
            seconds = (now - self._begun[0]) / (step - self._begun[1])
            if seconds * (steps - step) > _WORTH_TELLING:
                self.note(f"calibration takes {duration(seconds * steps)}: {steps} steps of {seconds:.2g} s")


_TIMED_STEPS, _WORTH_TELLING = 2, 60.0
"""Steps that the estimate is taken from, and seconds that are left for it to be worth a line."""


def duration(seconds: float) -> str:
    """A time in words: "about 40 min", "about 2 h 10 min"."""
    minutes = max(1, round(seconds / 60))
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h {rest} min" if hours else f"about {minutes} min"
