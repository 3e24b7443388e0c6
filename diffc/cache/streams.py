"""Which blocks add something to their input: of these, what they add can be kept while the input stays fresh."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

STREAMS: Mapping[str, tuple[str, ...]] = {
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "SD3SingleTransformerBlock": ("hidden_states",),
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "BasicTransformerBlock": ("hidden_states",),
    "LTXVideoTransformerBlock": ("hidden_states",),
    "WanTransformerBlock": ("hidden_states",),
}
"""Class of a block -> for each of its outputs, the argument that it adds to."""


def streams_of(module: nn.Module) -> tuple[str, ...] | None:
    """The argument that each output of a block adds to, in the order of outputs; None for a block that adds to none."""
    return STREAMS.get(type(module).__name__)


def kept_tensors(
    block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any, *, residual: bool
) -> list[Tensor]:
    """What a plan keeps of one call of `block`: the tensors of its output, minus those of its input with `residual`."""
    values = output if isinstance(output, tuple) else (output,)
    if residual and (streams := streams_of(block)) is not None:
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        values = tuple(v if v is None else v - given[s] for v, s in zip(values, streams, strict=True))
    return [tensor.detach().float() for tensor in _tensors(values)]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
