"""Names of an original release -> those of diffusers, by diffusers' converters on tensors without data."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffc.errors import DiffcError
from diffc.models.single.layouts import Layout, converter_of
from diffc.models.single.stand_ins import recipe_of, stand_in
from passes.base import PassError
from passes.weights.recipe import Recipe


@dataclass(frozen=True)
class Converted:
    """The weights by diffusers' names, and the names in the file that each was made of."""

    weights: Mapping[str, Recipe]
    origins: Mapping[str, frozenset[str]]


def convert(layout: Layout, weights: Mapping[str, Recipe], where: object) -> Converted:
    """`weights` (without prefix) as the layout's diffusers class has them.

    Raises DiffcError that lists the tensors which are left, or says what the converter lacks.
    """
    if not layout.is_original(weights):
        named = {name: recipe for name, recipe in weights.items() if name not in layout.unused}
        return Converted(named, {name: frozenset((name,)) for name in named})
    prefix = "model.diffusion_model." if layout.kind == "UNet2DConditionModel" else ""
    state = {f"{prefix}{name}": stand_in(recipe, name) for name, recipe in weights.items()}
    try:
        made = converter_of(layout)(checkpoint=state, config=_settings(weights))
    except (KeyError, ValueError, IndexError, RuntimeError, AttributeError, PassError) as error:
        raise DiffcError(
            f"{where}: diffusers' converter for {layout.title} cannot read it: {type(error).__name__} {error}",
            fix="check that the file is complete",
        ) from error
    found = {name: recipe_of(tensor) for name, tensor in made.items() if tensor is not None}
    used = frozenset[str]().union(*(keys for _, keys in found.values()))
    _check_left(weights, used, layout, where)
    return Converted({n: r for n, (r, _) in found.items()}, {n: keys for n, (_, keys) in found.items()})


def _check_left(weights: Collection[str], used: Collection[str], layout: Layout, where: object) -> None:
    left = [name for name in weights if name not in used and name not in layout.unused]
    if left:
        seen = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise DiffcError(
            f"{where}: {layout.title} has no use for {len(left)} of its tensors: {seen}",
            fix="give the file of the model alone; a LoRA belongs to --lora",
        )


def _settings(names: Mapping[str, Recipe]) -> dict[str, Any]:
    """The entries of a UNet's config that its converter asks for."""
    ops = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", name))]
    blocks = [int(m[1]) for name in names if (m := re.match(r"input_blocks\.(\d+)\.", name))]
    layers = min(ops) - 1 if ops else max(blocks, default=0)
    text = "text_time" if "label_emb.0.0.weight" in names else None
    return {"layers_per_block": layers, "addition_embed_type": text}


def config_of(layout: Layout, weights: Mapping[str, Recipe], where: object) -> dict[str, Any]:
    """config.json of the layout's class: what shapes tell, and the defaults of the class."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, layout.kind).__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    try:
        told = layout.config({name: recipe.shape for name, recipe in weights.items()})
    except (KeyError, StopIteration, IndexError, ZeroDivisionError, ValueError) as error:
        raise DiffcError(
            f"{where} looks like {layout.title} and lacks a tensor that tells its size: {error}",
            fix="check that the file is complete",
        ) from error
    config: dict[str, Any] = json.loads(json.dumps(defaults | told))
    return {"_class_name": layout.kind, **config}
