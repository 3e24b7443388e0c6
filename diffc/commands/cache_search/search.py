"""`diffc cache search`: the cache plan of best quality at a given speed-up.

The candidates are all rows of consecutive blocks, computed every 2 to 5 steps. Each has a speed-up, counted by torch,
and a predicted error: how much the blocks that it uses again would have changed. The most promising candidates are
then run on the prompts and judged by what they do to the latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffc.cache.plan import CachePlan, Entry, Steps
from diffc.cache.resolve import resolve
from diffc.cache.torch_apply import apply, backbone_of
from diffc.commands.cache_search.measure import Measured, SearchRequest, latents_of, measure
from diffc.errors import DiffcError
from diffc.progress import Update
from passes.files.atomic import write_text

EVERY = (2, 3, 4, 5)


@dataclass(frozen=True)
class Candidate:
    """A plan, the speed-up of the backbone's arithmetic, and the predicted error.

    `psnr` is that of the latents to the full run in dB, None before the candidate was run.
    """

    plan: CachePlan
    speedup: float
    predicted: float
    psnr: float | None = None


@dataclass(frozen=True)
class Found:
    """What was measured, the candidates that were run, fastest first, and the best one that is fast enough."""

    measured: Measured
    tried: tuple[Candidate, ...]
    best: Candidate

    def save(self, path: Path) -> None:
        """Write the best plan, as `diffc compile --cache-plan` reads it."""
        write_text(path, json.dumps(self.best.plan.to_json(), indent=1) + "\n")


def search(pipe: Any, request: SearchRequest, update: Update = lambda done, total: None) -> Found:
    """Measure `pipe` and propose a plan. Raises DiffcError when no candidate is as fast as asked for."""
    measured = measure(pipe, request)
    every = candidates(measured, backbone_of(pipe), request.steps)
    chosen = _promising(every, request)
    tried = []
    for number, candidate in enumerate(chosen):
        update(number + 1, len(chosen) + 1)
        with apply(pipe, candidate.plan):
            latents = latents_of(pipe, request)
        tried.append(replace(candidate, psnr=_psnr(measured.latents, latents)))
    best = max((c for c in tried if c.speedup >= request.speedup), key=lambda c: c.psnr or 0.0)
    return Found(measured, tuple(sorted(tried, key=lambda c: -c.speedup)), best)


def _promising(every: Sequence[Candidate], request: SearchRequest) -> list[Candidate]:
    """The candidates to run: the fast enough ones of least predicted error, and some of all speeds for the curve."""
    fast = sorted((c for c in every if c.speedup >= request.speedup), key=lambda c: c.predicted)
    if not fast:
        most = max((c.speedup for c in every), default=1.0)
        raise DiffcError(
            f"no plan makes the backbone {request.speedup:g} times as fast; the most is {most:.2f}",
            fix=f"ask for less: --speedup {int(most * 10) / 10:g}",
        )
    chosen = fast[: request.trials]
    return chosen + [c for c in _frontier(every) if c not in chosen][: request.trials]


def candidates(measured: Measured, backbone: nn.Module, steps: int) -> list[Candidate]:
    """Rows of consecutive blocks, computed every 2 to 5 steps, with their speed-up and predicted error."""
    found, count = [], len(measured.blocks)
    for first in range(count):
        for last in range(first + 1, count + 1):
            for every in EVERY:
                entry = Entry(measured.blocks[first:last], Steps(every=every))
                plan = CachePlan((entry,), f"search:{first}-{last - 1},every={every}")
                reused = [step for step in range(steps) if entry.steps.reuses(step, None)]
                saved = measured.shares[first:last].sum() * len(reused) / steps
                speedup = 1 / (1 - min(saved, 0.99))
                found.append(Candidate(plan, speedup, _predict(measured, first, last, every)))
    for candidate in found[:1]:
        resolve(candidate.plan, backbone)  # one is enough to show that the names are the backbone's
    return found


def _predict(measured: Measured, first: int, last: int, every: int) -> float:
    """Root of the sum, over all steps that use blocks again, of the squared changes since these were computed."""
    age, error = np.zeros(last - first), 0.0
    for step in range(1, measured.changes.shape[1]):
        age = age + measured.changes[first:last, step]
        if step % every == 0:
            age[:] = 0.0
        else:
            error += float(np.sum(age**2))
    return float(error**0.5)


def _frontier(every: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that no other beats in both speed and predicted error, spread over the speeds."""
    best: list[Candidate] = []
    for candidate in sorted(every, key=lambda c: (-c.speedup, c.predicted)):
        if not best or candidate.predicted < best[-1].predicted:
            best.append(candidate)
    return best[:: max(1, len(best) // 6)]


def _psnr(reference: Tensor, other: Tensor) -> float:
    """In dB; the peak is the range of the reference."""
    error = float((reference - other).square().mean())
    peak = float(reference.max() - reference.min())
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))
