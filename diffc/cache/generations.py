"""Tells generations apart: which denoising step a call of the backbone is, and which kept values it may use.

A pipeline calls the backbone step by step and never says where a generation begins. A call goes on with a generation of
the same prompt and shape whose time it is below; otherwise a new one begins, which uses nothing that was kept earlier.
Several prompts can be under way at a time: guidance whose branches are called in turn is a generation for each.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

_LOG = logging.getLogger(__name__)
_MOST_AT_A_TIME = 4
"""Generations of one branch that are kept: prompt, no prompt, and what perturbed attention adds to them."""
_RESTARTS = 3
"""Steps of one denoising loop that begin a generation anew, until the user is told."""


@dataclass(frozen=True)
class Condition:
    """A tensor that stays the same from step to step, such as the prompt's embedding.

    `version` is torch's count of writes to it. Tensors made in inference mode have none: there `tensor` is a copy.
    """

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> Condition:
        """What to remember of `tensor`."""
        return cls(tensor.clone(), None) if tensor.is_inference() else cls(tensor, tensor._version)

    def holds(self, new: Tensor) -> bool:
        """Whether `new` has the remembered values: the same tensor, not written to since, or equal values."""
        if new is self.tensor:
            return new._version == self.version
        if self.version is not None and self.tensor._version != self.version:
            return False
        same_kind = new.device == self.tensor.device and new.dtype == self.tensor.dtype
        return same_kind and new.shape == self.tensor.shape and bool((new == self.tensor).all())


@dataclass
class Generation:
    """One run of the denoising loop, or of one branch of guidance in it: its kept values and its current step."""

    time: float
    shapes: tuple[tuple[int, ...], ...]
    conditions: Mapping[str, Condition]
    step: int = 0
    values: dict[Any, Any] = field(default_factory=dict)

    def changed(self, shapes: tuple[tuple[int, ...], ...], conditions: Mapping[str, Tensor]) -> list[str]:
        """What keeps a call from being a step of this generation, whatever its time: names, or "the shape"."""
        if shapes != self.shapes:
            return ["the shape"]
        if conditions.keys() != self.conditions.keys():
            return sorted(conditions.keys() ^ self.conditions.keys())
        return [name for name, kept in self.conditions.items() if not kept.holds(conditions[name])]


@dataclass(frozen=True)
class CacheReport:
    """How a cache plan was followed: calls of the backbone, and those that used kept values."""

    steps: int = 0
    reused: int = 0

    def __sub__(self, earlier: CacheReport) -> CacheReport:
        return CacheReport(self.steps - earlier.steps, self.reused - earlier.reused)

    def __str__(self) -> str:
        return f"{self.reused} of {self.steps} steps used kept values"


@dataclass
class _Thread(threading.local):
    """The generations of one thread. Threads never see each other's; those of a thread end with it."""

    count: int | None
    branch: str = ""
    epoch: int = 0
    moment: float = float("-inf")
    restarts: int = 0
    generations: dict[str, list[Generation]] = field(default_factory=dict)


class Generations:
    """The generations of one backbone, a set for each thread and in it one for each branch of guidance.

    A generation has `count` steps unless `reset` gives another number; None: the number is not known.
    """

    def __init__(self, count: int | None = None) -> None:
        self._epoch = 0
        self._thread = _Thread(count)
        self._lock, self._report = threading.Lock(), CacheReport()

    @property
    def count(self) -> int | None:
        """The number of denoising steps of this thread's generation, None where it is not known."""
        return self._thread.count

    @property
    def report(self) -> CacheReport:
        """The calls of all threads so far."""
        return self._report

    def note(self, *, reused: bool) -> None:
        """Count a call; `reused`: it used kept values."""
        with self._lock:
            self._report = CacheReport(self._report.steps + 1, self._report.reused + reused)

    def advance(
        self, time: Tensor | float, inputs: Sequence[Tensor], conditions: Mapping[str, Tensor]
    ) -> Generation:
        """The generation that a call belongs to, its `step` set; a new one where the call follows none.

        `time` is the step's timestep or sigma (the first one of a batch), `inputs` all that has a shape,
        `conditions` what stays the same from step to step: the prompt's embeddings, by name.
        """
        thread = self._thread
        if thread.epoch != self._epoch:
            thread.generations.clear()
            thread.epoch = self._epoch
        moment = float(time.reshape(-1)[0]) if isinstance(time, Tensor) else float(time)
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        known = thread.generations.setdefault(thread.branch, [])
        earlier, thread.moment = thread.moment, moment
        for last in reversed(known):
            if moment < last.time and not last.changed(shapes, conditions):
                last.time, last.step, thread.restarts = moment, last.step + 1, 0
                return last
        if moment < earlier:
            self._restarted(known, shapes, conditions)
        new = Generation(moment, shapes, {name: Condition.of(t) for name, t in conditions.items()})
        # Those whose time is below the new one's are over; of the others, the latest are kept.
        known[:] = [*(g for g in known if g.time >= moment), new][-_MOST_AT_A_TIME:]
        return new

    def _restarted(
        self,
        known: Sequence[Generation],
        shapes: tuple[tuple[int, ...], ...],
        conditions: Mapping[str, Tensor],
    ) -> None:
        """Say once that a plan is not followed: time goes down, and every step looks like a generation of its own."""
        self._thread.restarts += 1
        if self._thread.restarts == _RESTARTS and known:
            what = ", ".join(known[-1].changed(shapes, conditions)) or "the time"
            _LOG.warning(
                "the cache plan is not followed: from step to step %s changed, so each step is computed in full",
                what,
            )

    def reset(self, count: int | None = None) -> None:
        """Forget what this thread has kept. Its next call is step 0 of a generation of `count` steps."""
        self._thread.count = count if count is not None else self._thread.count
        self._thread.generations.clear()
        self._thread.moment, self._thread.restarts = float("-inf"), 0

    def forget(self) -> None:
        """Forget what all threads have kept; each thread does so at its next call."""
        self._epoch += 1
        self._thread.generations.clear()

    @contextmanager
    def branch(self, name: str, **place: Any) -> Iterator[None]:
        """Calls of this thread belong to the branch of guidance `name` while this is open.

        It stands in for diffusers' `cache_context`; `place` (step_index, sigma) is where the loop is, which is counted
        here by itself.
        """
        del place
        before, self._thread.branch = self._thread.branch, name
        try:
            yield
        finally:
            self._thread.branch = before


_CHANGING = ("hidden_states", "sample", "timestep")
"""What the backbone is given anew in every step."""
_OF_CONTROLS = ("residual", "controlnet")
"""Words in the names of what a ControlNet or adapter computes in every step, from the latents as well."""


def time_and_conditions(given: Mapping[str, Any]) -> tuple[Any, list[Tensor], dict[str, Tensor]]:
    """Time, all tensors, and the conditions among the arguments of a diffusers backbone, by their names.

    `given` is flat or has mappings and lists in it (`added_cond_kwargs`, a ControlNet's residuals). The latents, the
    first of `hidden_states` and `sample`, the time and what a ControlNet adds change from step to step; the rest are
    conditions.
    """
    flat = dict(_flat(given))
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    conditions = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in _CHANGING and not any(word in name for word in _OF_CONTROLS)
    }
    return flat["timestep"], [t for n, t in tensors.items() if n != "timestep"], conditions


def _flat(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists: those of a mapping by their own names, of a list by number."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif isinstance(value, list | tuple):
            yield from _flat({f"{name}.{number}": item for number, item in enumerate(value)})
        else:
            yield name, value
