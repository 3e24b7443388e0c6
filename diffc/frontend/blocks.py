"""Finds the blocks of a backbone that repeat, and takes most of them out for the time of a trace.

Backbones are lists of equal blocks: 19 + 38 in FLUX.1, 10 in a level of SDXL. The exporter takes its
time for every block, so it is given the first two and the last; `diffc.frontend.copy_blocks` adds the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import CellType
from typing import Any

import torch
from torch import nn

KEPT = 3
"""Blocks of a run that are traced: the first (which makes what all share), the one that is copied, and the last."""


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row: those numbered `first` to `last` of the module list at `path`."""

    path: str
    first: int
    last: int

    @property
    def traced(self) -> tuple[str, ...]:
        """Module paths of the blocks that are traced, in order."""
        return tuple(self.block(i) for i in (*range(self.first, self.first + KEPT - 1), self.last))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Module paths of the blocks that are not traced, in order; they belong before the last one."""
        return tuple(self.block(i) for i in range(self.first + KEPT - 1, self.last))

    def block(self, index: int) -> str:
        """The module path of the block with that number."""
        return f"{self.path}.{index}"


def find_runs(backbone: nn.Module) -> list[Run]:
    """Runs of more than `KEPT` equal blocks; quantizers are compared as well, by what `traceable` notes at them.

    Lists inside a block of a run are not looked at, nor lists in which blocks share weights.
    """
    runs: list[Run] = []
    for path, module in backbone.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{r.path}.") for r in runs):
            continue
        if len(module) <= KEPT or _shares(module):
            continue
        for _, group in groupby(enumerate(module), key=lambda item: signature(item[1])):
            numbers = [number for number, _ in group]
            if len(numbers) > KEPT:
                runs.append(Run(path, numbers[0], numbers[-1]))
    return runs


def _shares(blocks: nn.ModuleList) -> bool:
    """Whether one tensor is part of several modules, which the signatures of blocks do not tell."""
    tensors = [
        tensor
        for named in (blocks.named_parameters, blocks.named_buffers)
        for _, tensor in named(remove_duplicate=False)
    ]
    return len({id(tensor) for tensor in tensors}) < len(tensors)


@contextmanager
def shortened(backbone: nn.Module, runs: Sequence[Run]) -> Iterator[None]:
    """While open, the backbone lacks the blocks that runs leave out; the others keep their module paths."""
    lists = {run.path: backbone.get_submodule(run.path) for run in runs}
    whole = {path: dict(module._modules) for path, module in lists.items()}
    for run in runs:
        for block in run.left_out:
            del lists[run.path]._modules[block.rpartition(".")[2]]
    try:
        yield
    finally:
        for path, module in lists.items():
            module._modules.clear()
            module._modules.update(whole[path])


def signature(block: nn.Module) -> Hashable:
    """Everything that decides the trace of a block: types, attributes and shapes of tensors, by path inside it."""
    return tuple(
        (path, type(module), _frozen({k: v for k, v in vars(module).items() if k != "_modules"}, _DEPTH))
        for path, module in block.named_modules()
    )


_DEPTH = 10
"""How far attributes are looked into."""


def _frozen(value: Any, depth: int) -> Hashable:
    """An attribute as something that compares by value; an object that cannot be looked into equals only itself."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), value.requires_grad)
    if depth == 0 or isinstance(value, partial):
        return ("object", id(value))
    if isinstance(value, Mapping):
        return ("mapping", *((_frozen(k, depth - 1), _frozen(v, depth - 1)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_frozen(item, depth - 1) for item in value))
    if isinstance(value, (list, tuple)):
        return (type(value), *(_frozen(item, depth - 1) for item in value))
    if callable(value) and hasattr(value, "__qualname__"):
        cells = [_frozen(cell, depth - 1) for cell in getattr(value, "__closure__", None) or ()]
        return ("function", value.__module__, value.__qualname__, *cells)
    if isinstance(value, CellType):
        return _frozen(getattr(value, "cell_contents", None), depth)  # an empty one has none
    if hasattr(value, "__dict__"):
        return (type(value), _frozen(vars(value), depth - 1))
    return (type(value), value) if isinstance(value, Hashable) else ("object", id(value))
