"""Tells generations apart: which denoising step a call of the backbone is, and which kept values it may use.

A pipeline calls the backbone step by step and never says where a generation begins. A new one begins when time does
not go down, or when prompt or shape differ from those of the call before. It uses nothing that was kept earlier.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Generation:
    """One run of the denoising loop, or of one branch of guidance in it: its kept values and its current step."""

    time: float
    shapes: tuple[tuple[int, ...], ...]
    conditions: tuple[tuple[Tensor, int], ...]
    step: int = 0
    values: dict[Any, Any] = field(default_factory=dict)


@dataclass
class _Thread(threading.local):
    """The generations of one thread. Threads never see each other's; those of a thread end with it."""

    count: int | None
    branch: str = ""
    epoch: int = 0
    generations: dict[str, Generation] = field(default_factory=dict)


class Generations:
    """The generations of one backbone, a set for each thread and in it one for each branch of guidance.

    A generation has `count` steps unless `reset` gives another number; None: the number is not known.
    """

    def __init__(self, count: int | None = None) -> None:
        self._epoch = 0
        self._thread = _Thread(count)

    @property
    def count(self) -> int | None:
        """The number of denoising steps of this thread's generation, None where it is not known."""
        return self._thread.count

    def advance(
        self, time: Tensor | float, inputs: Sequence[Tensor], conditions: Sequence[Tensor]
    ) -> Generation:
        """The generation that a call belongs to, its `step` set; a new one where the call cannot follow the last.

        `time` is the step's timestep or sigma (the first one of a batch), `inputs` all that has a shape,
        `conditions` what stays the same from step to step: the prompt's embeddings.
        """
        thread = self._thread
        if thread.epoch != self._epoch:
            thread.generations.clear()
            thread.epoch = self._epoch
        moment = float(time.reshape(-1)[0]) if isinstance(time, Tensor) else float(time)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        last = thread.generations.get(thread.branch)
        if last is not None and moment < last.time and shapes == last.shapes and _same(last, conditions):
            last.time, last.step = moment, last.step + 1
            return last
        kept = tuple((tensor, tensor._version) for tensor in conditions)
        new = Generation(moment, shapes, kept)
        thread.generations[thread.branch] = new
        return new

    def reset(self, count: int | None = None) -> None:
        """Forget what this thread has kept. Its next call is step 0 of a generation of `count` steps."""
        self._thread.count = count if count is not None else self._thread.count
        self._thread.generations.clear()

    def forget(self) -> None:
        """Forget what all threads have kept; each thread does so at its next call."""
        self._epoch += 1
        self._thread.generations.clear()

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Calls of this thread belong to the branch of guidance `name` while this is open."""
        before, self._thread.branch = self._thread.branch, name
        try:
            yield
        finally:
            self._thread.branch = before


def _same(last: Generation, conditions: Sequence[Tensor]) -> bool:
    """Whether conditions are those of the last step: the same tensors, not written to since, or equal values."""
    if len(conditions) != len(last.conditions):
        return False
    return all(
        (new is old and new._version == version)
        or (new is not old and old._version == version and new.device == old.device and _equal(new, old))
        for new, (old, version) in zip(conditions, last.conditions, strict=True)
    )


def _equal(new: Tensor, old: Tensor) -> bool:
    return new.shape == old.shape and new.dtype == old.dtype and bool((new == old).all())


def time_and_conditions(given: Mapping[str, Any]) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Time, all tensors, and the conditions among the arguments of a diffusers backbone, by their names.

    `given` is flat or has mappings in it (`added_cond_kwargs`). The latents, the first of `hidden_states`
    and `sample`, and the time change from step to step; the rest are conditions.
    """
    flat: dict[str, Any] = {}
    for name, value in given.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    changing = {"hidden_states", "sample", "timestep"}
    conditions = [tensor for name, tensor in tensors.items() if name not in changing]
    return flat["timestep"], [t for n, t in tensors.items() if n != "timestep"], conditions
