"""A cache plan as squares: in which step which block is computed, and in which its kept value is used again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from diffc.cache.resolve import ResolvedCache

_STEPS = 20
"""Steps that are drawn where the artifact does not say how many a picture takes."""


@dataclass(frozen=True)
class Schedule:
    """`reused` [blocks, steps]: whether a step uses the kept value of a block. `computed`: the share of squares that
    are computed, in which every block counts alike.
    """

    name: str
    layout: str
    blocks: Sequence[str]
    reused: npt.NDArray[np.bool_]
    kept: Mapping[str, str]

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return int(self.reused.shape[1])

    @property
    def computed(self) -> float:
        """The share of squares that are computed, 0 to 1."""
        return 1 - float(self.reused.mean()) if self.reused.size else 1.0


def schedule_of(manifest: Mapping[str, Any], blocks: Iterable[str]) -> Schedule | None:
    """The schedule of the artifact's cache plan; None without one. `blocks`: those of the graph, in its order."""
    cache = manifest.get("cache")
    if not cache:
        return None
    plan = ResolvedCache.from_json(cache["plan"])
    steps = manifest.get("sampling", {}).get("steps") or manifest.get("request", {}).get("steps") or _STEPS
    planned = [block for group in plan.groups for block in group.blocks]
    names = _in_order(planned, list(blocks))
    reused = np.zeros((len(names), steps), bool)
    for step, groups in enumerate(plan.schedule(steps)):
        for group in groups:
            for block in plan.groups[group].blocks:
                reused[names.index(block), step] = True
    kept = {block: group.keep for group in plan.groups for block in group.blocks}
    return Schedule(plan.name, cache.get("layout") or "full+reduced", names, reused, kept)


def _in_order(planned: Sequence[str], blocks: Sequence[str]) -> list[str]:
    """The blocks of the plan, and between them those of the graph that are no part of any, where the graph has them."""
    names: list[str] = []
    for block in blocks:
        related = [p for p in planned if f"{p}.".startswith(f"{block}.") or f"{block}.".startswith(f"{p}.")]
        names += [name for name in related or [block] if name not in names]
    return names + [block for block in planned if block not in names]
