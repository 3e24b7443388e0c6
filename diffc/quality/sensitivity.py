"""What each format of each layer costs at the output: one group of layers quantized, all else as it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffc.quantize.simulate import cpu_block_quant


@dataclass(frozen=True)
class Call:
    """One call of the unquantized backbone while its pipeline paints, and what it answered."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    answer: Tensor


@contextmanager
def recording(backbone: nn.Module, every: int = 1) -> Iterator[list[Call]]:
    """While open, each `every`-th call of `backbone` is kept, its tensors copied to the CPU."""
    calls: list[Call] = []
    count = 0

    def kept(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone()

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        if count % every == 0:
            given, named = pytree.tree_map_only(Tensor, kept, (args, kwargs))
            calls.append(Call(given, named, kept(_output(output))))
        count += 1

    handle = backbone.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def run(backbone: nn.Module, call: Call) -> Tensor:
    """What `backbone` answers to the inputs of a call, on the CPU."""
    device = next(backbone.parameters()).device
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (call.args, dict(call.kwargs)))
    with torch.no_grad(), cpu_block_quant():
        return _output(backbone(*args, **kwargs)).cpu()


def noise_of(backbone: nn.Module, calls: Sequence[Call]) -> float:
    """The squared difference to the answers of `calls`, over the square of these: each call counts alike."""
    shares = []
    for call in calls:
        error = run(backbone, call).double() - call.answer.double()
        shares.append(float(error.square().sum() / call.answer.double().square().sum()))
    return sum(shares) / len(shares)


def sharing_inputs(backbone: nn.Module, call: Call, paths: Sequence[str]) -> list[tuple[str, ...]]:
    """The layers at `paths` in groups that read the very same tensor, in the order in which they run."""
    groups: list[list[str]] = []
    seen: list[tuple[weakref.ref[Tensor], list[str]]] = []

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if any(path in group for group in groups):
                return
            mine = next((group for tensor, group in seen if tensor() is args[0]), None)
            if mine is None:
                mine = []
                groups.append(mine)
                seen.append((weakref.ref(args[0]), mine))
            mine.append(path)

        return before

    with ExitStack() as stack:
        for path in paths:
            handle = backbone.get_submodule(path).register_forward_pre_hook(watch(path))
            stack.callback(handle.remove)
        run(backbone, call)
    return [tuple(group) for group in groups]


@contextmanager
def replaced(backbone: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """While open, the modules at these paths of `backbone` are those of `layers`."""
    own = {path: backbone.get_submodule(path) for path in layers}
    for path, layer in layers.items():
        backbone.set_submodule(path, layer)
    try:
        yield backbone
    finally:
        for path, layer in own.items():
            backbone.set_submodule(path, layer)


def _output(output: Any) -> Tensor:
    """The tensor that a backbone answers with, in a tuple or in an output of diffusers."""
    found: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found
