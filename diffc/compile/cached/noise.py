"""Measures whether quantization harms a cache plan: the rounding noise of kept tensors beside their change by step.

A kept tensor has two errors: the backbone has moved on since it was kept, and it holds the rounding noise of the step
that made it. Noise that every step draws anew partly cancels over the steps; kept noise enters each step with the same
sign. Where noise is the larger error, the block is measured again without quantization, and the user reads what helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from diffc.cache.resolve import ResolvedCache
from diffc.cache.streams import kept_tensors
from diffc.compile.calibration import PipelineRun, usual_arguments
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.locate import ModelSource
from diffc.progress import Reporter
from diffc.quantize.calibrate import DEFAULT_PROMPTS
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.pipeline_call import call_arguments
from diffc.quantize.simulate import cpu_block_quant
from diffc.validate.torch_hooks import without_rounding
from diffc.validate.torch_reference import TorchReference

MOST_PIXELS = 512
"""Height and width of the measurement at most: it is of statistics, and runs on the CPU."""
HELPS = 0.8
"""What is left of the noise where leaving a block unquantized is worth a word."""
Kept = dict[str, list[Tensor]]
Call = Mapping[str, Any]


class _Enough(Exception):
    """Stops the pipeline when the wanted calls were seen."""


@dataclass(frozen=True)
class BlockNoise:
    """A block of a plan between two neighbouring steps; all figures relative to the L2 norm of what is kept.

    `change`: how far the kept tensors move without rounding. `noise`: how far rounding of activations moves them.
    `redrawn`: the part of the noise that the next step draws anew (of independent noise, all). `kept`: `redrawn` with
    the block left unquantized, measured where noise is the larger error, else None.
    """

    block: str
    change: float
    noise: float
    redrawn: float
    kept: float | None = None

    @property
    def fights(self) -> bool:
        """Whether the noise that would be drawn anew is larger than the change that caching neglects."""
        return self.redrawn > self.change

    @property
    def helped(self) -> bool:
        """Whether leaving the block unquantized removes at least a fifth of the noise."""
        return self.kept is not None and self.kept < HELPS * self.redrawn

    @property
    def pattern(self) -> str:
        """What --keep takes for the block."""
        return f"{self.block}.*"


@dataclass(frozen=True)
class CacheNoise:
    """The blocks of a plan from `step` - 1 to `step` of `steps`."""

    step: int
    steps: int
    blocks: tuple[BlockNoise, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `keep` lists the patterns that were measured to help."""
        patterns = [block.pattern for block in self.blocks if block.helped]
        return {**asdict(self), "blocks": [asdict(b) for b in self.blocks], "keep": patterns}


def measure_noise(
    source: ModelSource,
    dtype: str,
    cache: ResolvedCache,
    checkpoint: Checkpoint,
    run: PipelineRun,
    ui: Reporter,
) -> CacheNoise:
    """The rounding noise of a compile, also told to the user.

    Needs the pipeline, whose latents in two neighbouring steps cannot be made up, and torch's whole backbone.
    """
    steps = max(2, run.steps)
    with ui.stage("measure rounding noise of what is kept"):
        calls = neighbouring_calls(source, run, steps)
        model = TorchReference(source, dtype, checkpoint).model
        found = CacheNoise(steps // 2, steps, compare_noise(model, cache, calls))
    for line in describe(found):
        ui.note(f"cache plan: {line}")
    return found


def neighbouring_calls(source: ModelSource, run: PipelineRun, steps: int) -> list[Call]:
    """The arguments of the backbone in the two middle steps of a run with `steps` steps, in float32 on the CPU."""
    family = source.family
    calls: list[Call] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tree_map(_as_float32, {**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs})
        if not calls or not torch.equal(calls[-1]["timestep"], given["timestep"]):
            calls.append(given)  # a second call in a step is the other half of guidance
        if len(calls) > steps // 2:
            raise _Enough

    with quiet_libraries(), run.opened(source) as pipe:
        pipe.set_progress_bar_config(disable=True)
        height, width = (min(size, MOST_PIXELS) for size in run.size(pipe, family))
        handle = getattr(pipe, family.component).register_forward_pre_hook(note, with_kwargs=True)
        try:
            pipe(
                **call_arguments(
                    pipe.__call__,
                    [(run.prompts or DEFAULT_PROMPTS)[0]],
                    seeds=[run.seed],
                    steps=steps,
                    height=height,
                    width=width,
                    guidance=run.guidance,
                    usual=usual_arguments(family, pipe),
                    negative_prompt=run.negative_prompt,
                )
            )
        except _Enough:
            pass
        finally:
            handle.remove()
    return calls[-2:]


def _as_float32(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().to("cpu", copy=True)
    return copy.float() if copy.is_floating_point() else copy


def compare_noise(model: nn.Module, cache: ResolvedCache, calls: Sequence[Call]) -> tuple[BlockNoise, ...]:
    """Every block of `cache` in the two `calls` of the fake-quantized `model`, with rounding and without."""
    exact = _run(model, cache, calls, without_rounding(model))
    rounded = _run(model, cache, calls, nullcontext())
    blocks = tuple(
        BlockNoise(path, _change(exact, path), _noise(exact, rounded, path), _redrawn(exact, rounded, path))
        for path in exact[0]
    )
    prefixes = tuple(f"{block.block}." for block in blocks if block.fights)
    if not prefixes:
        return blocks
    helped = _run(model, cache, calls, without_rounding(model, lambda name: name.startswith(prefixes)))
    return tuple(
        replace(block, kept=_redrawn(exact, helped, block.block)) if block.fights else block
        for block in blocks
    )


def _run(
    model: nn.Module, cache: ResolvedCache, calls: Sequence[Call], rounding: AbstractContextManager[None]
) -> list[Kept]:
    """What the plan would keep in each of the calls, by block, in the order in which blocks run."""
    with rounding, torch.no_grad(), cpu_block_quant():
        found = []
        for given in calls:
            with _watched(model, cache) as kept:
                model(**{**given, "return_dict": False})
            found.append(kept)
    return found


@contextmanager
def _watched(model: nn.Module, cache: ResolvedCache) -> Iterator[Kept]:
    kept: Kept = {}

    def hook(path: str, residual: bool) -> Callable[..., None]:
        def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kept[path] = kept_tensors(block, args, kwargs, output, residual=residual)

        return note

    handles = [
        model.get_submodule(path).register_forward_hook(
            hook(path, group.keep == "residual"), with_kwargs=True
        )
        for group in cache.groups
        for path in group.blocks
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _change(exact: Sequence[Kept], path: str) -> float:
    before, after = (run[path] for run in exact)
    return _norm(b - a for a, b in zip(before, after, strict=True)) / _norm(after)


def _noise(exact: Sequence[Kept], rounded: Sequence[Kept], path: str) -> float:
    pairs = zip(exact[1][path], rounded[1][path], strict=True)
    return _norm(q - e for e, q in pairs) / _norm(exact[1][path])


def _redrawn(exact: Sequence[Kept], rounded: Sequence[Kept], path: str) -> float:
    """The noise that the steps do not share: a difference of two independent draws has twice the variance of one."""
    first, second = ([q - e for e, q in zip(exact[i][path], rounded[i][path], strict=True)] for i in range(2))
    apart = _norm(b - a for a, b in zip(first, second, strict=True))
    return apart / 2**0.5 / _norm(exact[1][path])


def _norm(tensors: Iterable[Tensor]) -> float:
    squares = sum(float(t.double().square().sum()) for t in tensors)
    return max(math.sqrt(squares), 1e-12)


def describe(found: CacheNoise) -> list[str]:
    """The lines for the user: one for all blocks, and one for every block where noise is the larger error."""
    changes, noises = ([getattr(b, name) for b in found.blocks] for name in ("change", "redrawn"))
    lines = [
        f"from step {found.step - 1} to {found.step} of {found.steps} kept tensors change by {_range(changes)},"
        f" and rounding of activations moves them, anew each step, by {_range(noises)}"
    ]
    return lines + [_advice(block) for block in found.blocks if block.fights]


def _advice(block: BlockNoise) -> str:
    """The line for a block: what is wrong, and what was measured to help."""
    wrong = (
        f"{block.block} changes by {block.change:.2%} and its rounding noise of {block.redrawn:.2%} is kept"
    )
    if block.helped:
        return f"{wrong}; calibrated with --keep '{block.pattern}' it is {block.kept or 0:.2%}"
    return (
        f"{wrong}. It comes with the block's inputs: left unquantized, the block has {block.kept or 0:.2%}. What"
        " helps is a format of finer steps, or a plan without the block"
    )


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2%} to {max(values):.2%}"
