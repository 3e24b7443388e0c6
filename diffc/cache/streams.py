"""Which blocks add to what they are given: for them the sum can be kept, and the input stay fresh."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

STREAMS: Mapping[str, tuple[str, ...]] = {
    "JointTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "SD3SingleTransformerBlock": ("hidden_states",),
    "FluxTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "FluxSingleTransformerBlock": ("encoder_hidden_states", "hidden_states"),
    "BasicTransformerBlock": ("hidden_states",),
}
"""Class of a block -> for each of its outputs, the argument that it adds to."""


def streams_of(module: nn.Module) -> tuple[str, ...] | None:
    """The arguments that the outputs of a block add to, in the order of its outputs; None where they do not."""
    return STREAMS.get(type(module).__name__)
