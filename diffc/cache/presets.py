"""Cache plans by name: published ways to cache, and ModelOpt's own defaults (its example `cache_diffusion`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from diffc.cache.plan import CachePlan, Entry, Steps
from diffc.cache.resolve import block_names
from diffc.errors import DiffcError, unknown_value

Arguments = Mapping[str, float]


@dataclass(frozen=True)
class Preset:
    """A plan that `make` builds for a backbone from arguments, of which `defaults` are the usual values."""

    summary: str
    defaults: Arguments
    make: Callable[[nn.Module, Arguments], tuple[Entry, ...]]


def _deepcache(backbone: nn.Module, given: Arguments) -> tuple[Entry, ...]:
    """DeepCache (arXiv:2312.00858): the outer levels of a UNet run in every step, all levels below are kept."""
    levels, every = int(given["levels"]), Steps(every=int(given["every"]))
    last = len([name for name in block_names(backbone) if name.startswith("up_blocks.")]) - 1
    if not 1 <= levels <= last:
        raise DiffcError(f"deepcache has levels={levels}", fix=f"give 1 to {last} for this backbone")
    blocks = (f"down_blocks.{levels}-{last}", "mid_block", f"up_blocks.0-{last - levels}")
    return (Entry(blocks, every, "output"),)


def _blocks(backbone: nn.Module, given: Arguments) -> tuple[Entry, ...]:
    """The inner blocks of a transformer: what all of them together add is kept (as in Delta-DiT, arXiv:2406.01125)."""
    names = [name for name in block_names(backbone) if re.match(r"(\w*transformer_)?blocks\.", name)]
    first, last = int(given["first"]), len(names) - int(given["last"])
    if not 0 <= first < last <= len(names):
        raise DiffcError(
            f"of {len(names)} blocks none is between the first {first} and the last {given['last']:g}",
            fix="give smaller numbers",
        )
    return (Entry(tuple(names[first:last]), Steps(every=int(given["every"]))),)


def _tgate(backbone: nn.Module, given: Arguments) -> tuple[Entry, ...]:
    """T-Gate (arXiv:2404.02747): cross attention changes little after some steps, and is kept from there on."""
    found = [path for path, m in backbone.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    names = tuple(f"{path}.attn2" for path in found if backbone.get_submodule(path).attn2 is not None)
    if not names:
        raise DiffcError(
            "this backbone has no cross attention: text and image attend jointly", fix="keep blocks"
        )
    return (Entry(names, Steps(start=given["step"]), "output"),)


def _fixed(*entries: Entry) -> Callable[[nn.Module, Arguments], tuple[Entry, ...]]:
    return lambda backbone, given: entries


_UNET = ("down_blocks.*", "mid_block", "up_blocks.*")
_ODD = Steps(every=2)

PRESETS: Mapping[str, Preset] = {
    "deepcache": Preset("a UNet's inner levels", {"every": 3, "levels": 1}, _deepcache),
    "blocks": Preset(
        "what a transformer's inner blocks add",
        {"every": 2, "first": 1, "last": 1},
        _blocks,
    ),
    "tgate": Preset("cross attention after a step", {"step": 10}, _tgate),
    "modelopt-sdxl": Preset(
        "ModelOpt's default: all but up_blocks.2, odd steps",
        {},
        _fixed(Entry(_UNET, _ODD, "output", exclude=("up_blocks.2",))),
    ),
    "modelopt-sd3": Preset(
        "ModelOpt's default: blocks 0 to 15, odd steps",
        {},
        _fixed(Entry(("transformer_blocks.0-15",), _ODD, "output")),
    ),
    "modelopt-svd": Preset(
        "ModelOpt's default: all but up_blocks.3, odd steps",
        {},
        _fixed(Entry(_UNET, _ODD, "output", exclude=("up_blocks.3",))),
    ),
    "modelopt-pixart": Preset(
        "what ModelOpt's default means: all but blocks 21 to 27, two of three steps",
        {},
        _fixed(
            Entry(("transformer_blocks.*",), Steps(every=3), "output", exclude=("transformer_blocks.21-27",))
        ),
    ),
}


def preset(text: str, backbone: nn.Module) -> CachePlan:
    """The plan of a preset on `backbone`, written `name` or `name:argument=number,...`.

    Raises DiffcError that lists the known presets or arguments.
    """
    name, _, arguments = text.partition(":")
    if name not in PRESETS:
        raise unknown_value("cache plan", name, PRESETS, fix="name one of these, or a .json or .yaml file")
    found = PRESETS[name]
    given = dict(found.defaults)
    for item in filter(None, arguments.split(",")):
        key, _, value = item.partition("=")
        if key not in given:
            raise unknown_value(f"argument of cache plan {name}", key, given)
        try:
            given[key] = float(value)
        except ValueError as error:
            raise DiffcError(f"{item!r} of cache plan {name} has no number", fix=f"{key}=2, say") from error
    return CachePlan(found.make(backbone, given), text)


def plan_of(text: str, backbone: nn.Module) -> CachePlan:
    """A plan file (.json, .yaml, .yml) or a preset. Raises DiffcError as those do."""
    if text.endswith((".json", ".yaml", ".yml")):
        return CachePlan.load(Path(text))
    return preset(text, backbone)
