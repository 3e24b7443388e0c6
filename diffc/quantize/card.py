"""What a call of a backbone takes of a GPU, and how the rest is shared: by more batches at once, and by weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffc.quantize.arrivals import WINDOW
from diffc.quantize.stream import WeightStream

MOST = 8
"""Batches at once: at eight, weights that come from a disk at 3 GB/s no longer decide."""
_SPARE = 0.08
"""Share of a GPU that is left free, for what the allocator cannot join."""
_WINDOWS = 24
"""Windows of weights in a GPU's memory; three of them hold weights."""
_MORE = 1.25
"""What a batch takes beside another, in multiples of what it was seen to hold between two layers."""


@dataclass(frozen=True)
class Need:
    """Bytes of a GPU that one call of a backbone takes: `peak` at most in all, `live` between two of its layers."""

    peak: int
    live: int


class _Measured(BaseException):
    """The backbone's first call is over; no error, so that no library takes it for one of its own."""


def card_limit() -> int:
    """Bytes of the current GPU that this process may have: what is free or its own, as far as torch was allowed it."""
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), int(torch.cuda.get_per_process_memory_fraction() * total))


def measure_call(backbone: nn.Module, stream: WeightStream, run: Callable[[], None]) -> Need:
    """What the first call of `backbone` takes when `run` is called, which is stopped after it."""
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated() - stream.present
    most = 0

    def between(*_: Any) -> None:
        nonlocal most
        most = max(most, torch.cuda.memory_allocated() - stream.present - base)

    def over(*_: Any) -> None:
        raise _Measured

    with ExitStack() as stack, suppress(_Measured):
        for layer in stream.layers:
            stack.callback(layer.register_forward_pre_hook(between).remove)
        stack.callback(backbone.register_forward_hook(over).remove)
        run()
    on_their_way = (
        3 * stream.arrivals.window
    )  # coming, there, and gone soon: none yet, the order was not known
    return Need(torch.cuda.memory_reserved() + on_their_way, most)


def window_of(limit: int, weights: Mapping[str, int]) -> int:
    """Bytes of weights that are on their way at a time, on a GPU of `limit` bytes."""
    return max(min(WINDOW, limit // _WINDOWS), max(weights.values(), default=0))


def share(need: Need, limit: int, weights: Mapping[str, int], batches: int) -> tuple[int, int]:
    """How many of `batches` run at once, and the bytes for weights that stay: (1, all) when all `weights` may stay.

    `limit`: bytes of the GPU; `weights`: bytes of those that do not stay yet.
    """
    left = int(limit * (1 - _SPARE)) - need.peak
    if left <= 0:
        return 1, 0
    if sum(weights.values()) <= left:
        return 1, left
    cost = max(1, int(need.live * _MORE))
    together = 1 + min(MOST - 1, batches - 1, left // cost)
    return together, left - (together - 1) * cost
