"""Arguments that are a list of one tensor per image, and the one tensor that a graph takes in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = "_lengths"
"""Behind the name of a list whose tensors differ in length: the input [images] that holds the lengths."""
Lists = Mapping[str, bool]
"""Names of the arguments that are lists, and whether their tensors may differ in length."""


def joined(arguments: Mapping[str, Any], lists: Lists) -> dict[str, Any]:
    """The arguments of a call with one tensor for each list, zeros at the ends of shorter ones, and their lengths.

    before: x=[a, b], cap_feats=[17 x 64, 5 x 64]
    after:  x [2, ...], cap_feats [2, 17, 64], cap_feats_lengths [17, 5]
    """
    import torch

    found: dict[str, Any] = {}
    for name, value in arguments.items():
        found[name] = value
        if name in lists and isinstance(value, list | tuple):
            found[name] = torch.nn.utils.rnn.pad_sequence(list(value), batch_first=True)
            if lists[name]:
                found[name + LENGTHS] = torch.tensor([len(item) for item in value], device=value[0].device)
    return found


def parted(arguments: Mapping[str, Any], lists: Lists) -> dict[str, Any]:
    """The inverse of `joined`: the arguments as diffusers' own forward() takes them."""
    found = {n: v for n, v in arguments.items() if n.removesuffix(LENGTHS) not in lists or n in lists}
    for name, ragged in lists.items():
        items: Sequence[Tensor] = arguments[name].unbind()
        if ragged:
            lengths = arguments[name + LENGTHS].tolist()
            items = [item[:length] for item, length in zip(items, lengths, strict=True)]
        found[name] = list(items)
    return found
