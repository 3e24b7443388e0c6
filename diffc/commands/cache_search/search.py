"""`diffc cache search`: how much blocks change from step to step, and the plan of best quality at a given speed-up.

Every plan of a family of candidates (blocks in a row, every N steps) has a share of the arithmetic that it saves,
counted by torch, and a predicted error: how much the blocks that it uses again would have changed. The most
promising ones are then run on the prompts and judged by what they do to the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffc.cache.plan import CachePlan, Entry, Steps
from diffc.cache.resolve import block_names, resolve
from diffc.cache.streams import kept_tensors
from diffc.cache.torch_apply import apply, backbone_of
from diffc.errors import DiffcError

EVERY = (2, 3, 4, 5)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What to search with: prompts, denoising steps, the speed-up asked for, and how many plans to run."""

    prompts: tuple[str, ...]
    steps: int = 20
    speedup: float = 1.5
    trials: int = 6
    seed: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Measured:
    """A full run: blocks in the order in which they ran, the share of the backbone's arithmetic of each, and how much
    what a plan would keep of them changed in each step, relative to itself ([blocks, steps], NaN in step 0).
    """

    blocks: tuple[str, ...]
    shares: npt.NDArray[np.float64]
    changes: npt.NDArray[np.float64]
    latents: Tensor


@dataclass(frozen=True)
class Candidate:
    """A plan, the speed-up of the backbone's arithmetic, the predicted error, and, once run, the PSNR of the latents
    to the full run in dB.
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


def search(pipe: Any, request: Request, progress: Progress = lambda done, total: None) -> Found:
    """Measure `pipe` and propose a plan. Raises DiffcError when no candidate is as fast as asked for."""
    measured = measure(pipe, request)
    every = candidates(measured, backbone_of(pipe), request.steps)
    fast = sorted((c for c in every if c.speedup >= request.speedup), key=lambda c: c.predicted)
    if not fast:
        most = max((c.speedup for c in every), default=1.0)
        raise DiffcError(
            f"no plan makes the backbone {request.speedup:g} times as fast; the most is {most:.2f}",
            fix=f"ask for less: --speedup {int(most * 10) / 10:g}",
        )
    chosen = fast[: request.trials]
    chosen += [c for c in _frontier(every) if c not in chosen][: request.trials]
    tried = []
    for number, candidate in enumerate(chosen):
        progress(number, len(chosen))
        with apply(pipe, candidate.plan):
            latents = _latents(pipe, request)
        tried.append(
            Candidate(
                candidate.plan, candidate.speedup, candidate.predicted, _psnr(measured.latents, latents)
            )
        )
    best = max((c for c in tried if c.speedup >= request.speedup), key=lambda c: c.psnr or 0.0)
    return Found(measured, tuple(sorted(tried, key=lambda c: -c.speedup)), best)


def measure(pipe: Any, request: Request) -> Measured:
    """Run the prompts in full, watching every block."""
    backbone = backbone_of(pipe)
    watches: dict[str, _Watch] = {}
    counts = {"": _Count(backbone)}
    handles: list[Any] = []
    for name in block_names(backbone):
        counts[name] = _Count(backbone.get_submodule(name))
        watches[name] = _Watch()
        handles.append(backbone.get_submodule(name).register_forward_hook(watches[name], with_kwargs=True))
    handles += _order(backbone, watches, order := list[str]())
    handles += counts.values()
    try:
        latents = _latents(pipe, request)
    finally:
        for handle in handles:
            handle.remove()
    shares = np.array([counts[name].operations / counts[""].operations for name in order])
    changes = np.array([watches[name].changes for name in order])
    return Measured(tuple(order), shares, changes, latents)


def _order(backbone: nn.Module, names: Iterable[str], order: list[str]) -> list[Any]:
    """Hooks that enter blocks into `order` as they run for the first time; a UNet's are registered in another."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: None if name in order else order.append(name)

    return [backbone.get_submodule(name).register_forward_hook(enter(name)) for name in names]


class _Watch:
    """A hook that notes how much what a plan would keep of a block, its residual or else its output, changes."""

    def __init__(self) -> None:
        self.changes: list[float] = []
        self._last: list[Tensor] = []

    def __call__(self, block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        new = kept_tensors(block, args, kwargs, output, residual=True)
        self.changes.append(_change(self._last, new) if self._last else float("nan"))
        self._last = new


def _change(old: Sequence[Tensor], new: Sequence[Tensor]) -> float:
    moved = sum(float((b - a).square().sum()) for a, b in zip(old, new, strict=True))
    size = sum(float(b.square().sum()) for b in new)
    return float((moved / max(size, 1e-24)) ** 0.5)


class _Count:
    """Counts the arithmetic of a module's first call."""

    def __init__(self, module: nn.Module) -> None:
        self.operations = 0.0
        self._counter: Any = FlopCounterMode(display=False)  # its methods have no types
        self._handles = [
            module.register_forward_pre_hook(self._start),
            module.register_forward_hook(self._stop),
        ]

    def _start(self, *_: Any) -> None:
        self._counter.__enter__()

    def _stop(self, *_: Any) -> None:
        self._counter.__exit__(None, None, None)
        self.operations = float(self._counter.get_total_flops())
        self.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def candidates(measured: Measured, backbone: nn.Module, steps: int) -> list[Candidate]:
    """Blocks in a row, every 2 to 5 steps, with what they save and their predicted error."""
    found, count = [], len(measured.blocks)
    for first in range(count):
        for last in range(first + 1, count + 1):
            for every in EVERY:
                entry = Entry(measured.blocks[first:last], Steps(every=every))
                plan = CachePlan((entry,), f"search:{first}-{last - 1},every={every}")
                reused = [step for step in range(steps) if entry.steps.reuses(step, None)]
                saved = measured.shares[first:last].sum() * len(reused) / steps
                found.append(
                    Candidate(plan, 1 / (1 - min(saved, 0.99)), _predict(measured, first, last, every))
                )
    for candidate in found[:1]:
        resolve(candidate.plan, backbone)  # names are those of the backbone
    return found


def _predict(measured: Measured, first: int, last: int, every: int) -> float:
    """Sum over the steps that use blocks again of how far they are from what was kept: changes add up since then."""
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


def _latents(pipe: Any, request: Request) -> Tensor:
    size = {} if request.size is None else {"height": request.size, "width": request.size}
    generators = [torch.Generator().manual_seed(request.seed + n) for n in range(len(request.prompts))]
    with torch.no_grad():
        images = pipe(
            list(request.prompts),
            num_inference_steps=request.steps,
            generator=generators,
            output_type="latent",
            **size,
        ).images
    return torch.as_tensor(images).float().cpu()


def _psnr(reference: Tensor, other: Tensor) -> float:
    """In dB; the peak is the range of the reference."""
    error = float((reference - other).square().mean())
    peak = float(reference.max() - reference.min())
    return float("inf") if error == 0 else float(10 * np.log10(peak**2 / error))


def draw(found: Found, path: Path) -> None:
    """The heat map of changes (block by step) beside the curve of speed-up and PSNR, as PNG, SVG or PDF."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = found.measured
    height = max(3.5, 0.25 * len(measured.blocks))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, height), layout="constrained")
    image = left.imshow(measured.changes, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=left, label="change since the step before")
    left.set_yticks(range(len(measured.blocks)), measured.blocks, fontsize=7)
    left.set_xlabel("step")
    right.plot([c.speedup for c in found.tried], [c.psnr for c in found.tried], "o")
    right.plot([found.best.speedup], [found.best.psnr], "*", markersize=14, label="proposed")
    right.set_xlabel("speed-up of the backbone's arithmetic")
    right.set_ylabel("PSNR of the latents to the full run (dB)")
    right.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
