"""How much the blocks of a backbone change from step to step, and their share of its arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffc.cache.resolve import block_names
from diffc.cache.streams import kept_tensors
from diffc.cache.torch_apply import backbone_of


@dataclass(frozen=True)
class SearchRequest:
    """What to search with: prompts, denoising steps, the speed-up asked for, and how many plans to run.

    `size` is in pixels; None is the model's own.
    """

    prompts: tuple[str, ...]
    steps: int = 20
    speedup: float = 1.5
    trials: int = 6
    seed: int = 0
    size: int | None = None


@dataclass(frozen=True)
class Measured:
    """What a full run of the pipeline shows.

    `blocks` are in the order in which they ran, `shares` [blocks] their share of the backbone's arithmetic. `changes`
    [blocks, steps] is how much the tensors that a plan would keep of a block changed in each step, relative to their
    size; NaN in step 0.
    """

    blocks: tuple[str, ...]
    shares: npt.NDArray[np.float64]
    changes: npt.NDArray[np.float64]
    latents: Tensor


def measure(pipe: Any, request: SearchRequest) -> Measured:
    """Run the prompts in full and watch every block."""
    backbone = backbone_of(pipe)
    watches: dict[str, _Watch] = {}
    counts = {"": _Count(backbone)}
    handles: list[Any] = []
    for name in block_names(backbone):
        counts[name] = _Count(backbone.get_submodule(name))
        watches[name] = _Watch()
        handles.append(backbone.get_submodule(name).register_forward_hook(watches[name], with_kwargs=True))
    handles += _note_order(backbone, watches, order := list[str]())
    handles += counts.values()
    try:
        latents = latents_of(pipe, request)
    finally:
        for handle in handles:
            handle.remove()
    shares = np.array([counts[name].operations / counts[""].operations for name in order])
    changes = np.array([watches[name].changes for name in order])
    return Measured(tuple(order), shares, changes, latents)


def _note_order(backbone: nn.Module, names: Iterable[str], order: list[str]) -> list[Any]:
    """Hooks that append each block to `order` when it first runs. A UNet registers its blocks in another order."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: None if name in order else order.append(name)

    return [backbone.get_submodule(name).register_forward_hook(enter(name)) for name in names]


class _Watch:
    """A hook that notes how much the tensors that a plan would keep of a block change between its calls."""

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


def latents_of(pipe: Any, request: SearchRequest) -> Tensor:
    """The latents that the pipeline makes of the prompts, float32 on the CPU."""
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
