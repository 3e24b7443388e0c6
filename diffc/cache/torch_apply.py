"""Runs a cache plan on a torch backbone, so that a plan can be tried before anything is compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from diffc.cache.generations import CacheReport, Generation, Generations, time_and_conditions
from diffc.cache.plan import CachePlan
from diffc.cache.presets import plan_of
from diffc.cache.resolve import Group, ResolvedCache, resolve
from diffc.cache.streams import streams_of
from diffc.errors import DiffcError

_MARK = "_diffc_cache"
Step = tuple[Generation, frozenset[int]]


@dataclass
class AppliedCache:
    """A plan that runs on a backbone. `remove`, or the end of its `with` block, restores the backbone.

    `generations.reset(count)` starts a generation anew, where no pipeline does it.
    """

    plan: ResolvedCache
    generations: Generations
    _undo: ExitStack

    def report(self) -> CacheReport:
        """How many steps there were so far, and how many of them used kept values."""
        return self.generations.report

    def remove(self) -> None:
        """Restore the backbone; a second call does nothing."""
        self._undo.close()

    def __enter__(self) -> AppliedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(target: Any, plan: CachePlan | ResolvedCache | str, *, steps: int | None = None) -> AppliedCache:
    """Run `target`, a diffusers pipeline or its backbone, with a plan, a preset's name or a plan file.

    Given a pipeline, every call of it is a new generation whose number of steps is known; given a backbone, say
    `steps` where the plan depends on it. Guidance halves are parts of a batch or branches (`cache_context`),
    kept apart either way, and so are threads. Raises DiffcError when the plan does not fit, or one is applied.
    """
    backbone = backbone_of(target)
    if hasattr(backbone, _MARK):
        raise DiffcError("this backbone has a cache plan already", fix="remove() that one first")
    plan = plan_of(plan, backbone) if isinstance(plan, str) else plan
    resolved = resolve(plan, backbone) if isinstance(plan, CachePlan) else plan
    generations, undo = Generations(steps), ExitStack()
    current: ContextVar[Step | None] = ContextVar("diffc_cache_step", default=None)
    applied = AppliedCache(resolved, generations, undo)
    _set(backbone, _MARK, applied, undo)
    _set(backbone, "forward", _counting(backbone, resolved, generations, current), undo)
    if hasattr(backbone, "cache_context"):
        _set(backbone, "cache_context", generations.branch, undo)
    for number, group in enumerate(resolved.groups):
        for path in group.blocks:
            block = backbone.get_submodule(path)
            _set(block, "forward", _keeping(block, path, number, group, current), undo)
    scheduler = getattr(target, "scheduler", None)
    if target is not backbone and hasattr(scheduler, "set_timesteps"):
        _set(scheduler, "set_timesteps", _telling(scheduler, generations), undo)
    return applied


def backbone_of(target: Any) -> nn.Module:
    """The backbone of a pipeline, or `target` itself. Raises DiffcError when it is neither."""
    found = getattr(target, "transformer", None) or getattr(target, "unet", None) or target
    if not isinstance(found, nn.Module):
        raise DiffcError(
            f"{type(target).__name__} has no backbone", fix="give a diffusers pipeline or module"
        )
    return found


def _set(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Give `owner` an attribute of its own that hides the class's, until `undo` runs."""
    before = vars(owner).get(name, owner)
    object.__setattr__(owner, name, value)
    undo.callback(_restore, owner, name, before)


def _restore(owner: Any, name: str, before: Any) -> None:
    if before is owner:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, before)


def _counting(
    backbone: nn.Module, plan: ResolvedCache, generations: Generations, current: ContextVar[Step | None]
) -> Callable[..., Any]:
    """A forward of the backbone that finds the current step before the blocks run."""
    forward, signature = backbone.forward, inspect.signature(backbone.forward)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        generation = generations.advance(*time_and_conditions(given))
        reused = plan.reused(generation.step, generations.count)
        generations.note(reused=bool(reused))
        token = current.set((generation, reused))
        try:
            return forward(*args, **kwargs)
        finally:
            current.reset(token)

    return run


def _keeping(
    block: nn.Module, path: str, number: int, group: Group, current: ContextVar[Step | None]
) -> Callable[..., Any]:
    """A forward of the block that returns the kept value where the plan says so, and keeps it elsewhere."""
    forward, signature = block.forward, inspect.signature(block.forward)
    streams = streams_of(block) if group.keep == "residual" else None

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        step = current.get()
        if step is None:  # the block is called by itself
            return forward(*args, **kwargs)
        generation, reused = step
        given = [signature.bind(*args, **kwargs).arguments[name] for name in streams or ()]
        if number in reused:
            return _add(generation.values[path], given, 1) if streams else generation.values[path]
        output = forward(*args, **kwargs)
        generation.values[path] = _add(output, given, -1) if streams else output
        return output

    return run


def _add(values: Any, given: list[Tensor], sign: int) -> Any:
    """`values` plus or minus the inputs that they add to; a value of None (a stream that ends) stays."""
    if isinstance(values, Tensor):
        return values + given[0] if sign > 0 else values - given[0]
    pairs = zip(values, given, strict=True)
    return tuple(v if v is None else (v + x if sign > 0 else v - x) for v, x in pairs)


def _telling(scheduler: Any, generations: Generations) -> Callable[..., Any]:
    """The scheduler's set_timesteps, which also starts a generation: every pipeline calls it before its loop."""
    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at its parameters
    def run(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        generations.reset(len(scheduler.timesteps))
        return result

    return run
