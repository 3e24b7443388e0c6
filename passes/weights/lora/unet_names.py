"""Names of a UNet's layers in the original release of Stable Diffusion ("sgm"), from the names of diffusers' layers.

There, blocks are numbered through all levels: `input_blocks.4.1` is the attention after the second residual block's
successor. How many residual blocks a level has, and where it halves the image, is read from the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def sgm_names(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """(their name, ours) of every layer below the blocks of a UNet; nothing for another model."""
    blocks = _numbers(modules)
    attentive = {m[2] for m in map(_MIDDLE_ATTENTION.match, modules) if m}
    for module in modules:
        if match := _PLACE.fullmatch(module):
            side, level, kind, index, rest = match.groups()
            number = blocks.get((side, int(level), kind, int(index)))
            if number is not None:
                yield f"{number}.{_inner(kind, rest)}", module
        elif match := _MIDDLE.fullmatch(module):
            kind, index, rest = match.groups()
            slot = 1 if kind == "attentions" else 0 if index == "0" else 2 if attentive else 1
            yield f"middle_block.{slot}.{_inner(kind, rest)}", module


_MIDDLE_ATTENTION = re.compile(r"(mid_block\.attentions)\.(\d+)\.")


def _inner(kind: str, rest: str) -> str:
    """What a layer is called inside its block."""
    if kind == "resnets":
        return _RESNET.get(rest, rest)
    return "op" if kind == "downsamplers" and rest == "conv" else rest


def _numbers(modules: Collection[str]) -> dict[tuple[str, int, str, int], str]:
    """(side, level, kind, index) of our blocks -> their `input_blocks.N.M` or `output_blocks.N.M`."""
    there = {(m[1], int(m[2]), m[3], int(m[4])) for m in map(_PLACE.fullmatch, modules) if m}
    numbers = {}
    for side, theirs, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        number = first
        for level in range(1 + max((key[1] for key in there if key[0] == side), default=-1)):
            count = sum(key[:3] == (side, level, "resnets") for key in there)
            for index in range(count):
                attends = (side, level, "attentions", index) in there
                numbers[side, level, "resnets", index] = f"{theirs}.{number}.0"
                numbers[side, level, "attentions", index] = f"{theirs}.{number}.1"
                if side == "up" and index == count - 1:
                    numbers[side, level, "upsamplers", 0] = f"{theirs}.{number}.{1 + attends}"
                number += 1
            if (side, level, "downsamplers", 0) in there:
                numbers[side, level, "downsamplers", 0] = f"{theirs}.{number}.0"
                number += 1
    return numbers
