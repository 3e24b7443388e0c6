"""Every name under which a file may know the layers of a model, made forwards from the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from passes.weights.lora.rules import LAYERS, OVERRIDES, SPELLINGS, WORDS
from passes.weights.lora.unet_names import sgm_names

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a parameter -> its shape."""


@dataclass(frozen=True)
class Piece:
    """Rows of what a file has as one layer: `count` from row `first` on are the rows of our `module`.

    `count` None: all of them. `swapped`: the halves of these rows are the other way round in the file.
    """

    module: str
    first: int = 0
    count: int | None = None
    swapped: bool = False


Layer = tuple[Piece, ...]


@dataclass(frozen=True)
class Spellings:
    """Name of a layer in a file, without a trainer's prefix -> the layer; also with `_` in the place of every dot.

    `overridden` are names that mean another layer in files of the project that `rules.WORDS` tells.
    """

    names: Mapping[str, Layer]
    overridden: Mapping[str, Layer]

    def find(self, name: str, *, overrides: bool = False) -> Layer | None:
        """The layer that a file calls `name`; None when the model has none."""
        return (self.overridden.get(name) if overrides else None) or self.names.get(name)


def spellings_of(shapes: Shapes) -> Spellings:
    """All spellings of the layers of a model whose parameters are `shapes`.

    A name that would stand for two layers stands for none, unless one of them has exactly this name.
    """
    modules = _modules(shapes)
    own = {module: (Piece(module),) for module in modules}
    found: dict[str, Layer] = dict(own)
    for name, layer in (*_of_rules(LAYERS, shapes, modules), *_of_sgm(modules), *_of_spellings(modules)):
        found.setdefault(name, layer)
    for name, layer in list(found.items()):
        for other in _processors(name):
            found.setdefault(other, layer)
    overridden = dict(_of_rules(OVERRIDES, shapes, modules))
    return Spellings(found | _flat(found, own), overridden | _flat(overridden, {}))


def rule_layers(
    rules: tuple[tuple[str, tuple[str, ...]], ...], shapes: Shapes
) -> Iterator[tuple[str, Layer]]:
    """(their name, layer) of every line of `rules` that counts for a model with these parameters."""
    yield from _of_rules(rules, shapes, _modules(shapes))


def is_overriding(name: str) -> bool:
    """Whether a layer's name in a file tells that the file is of the project whose names override ours."""
    return any(word in name for word in WORDS)


def _modules(shapes: Shapes) -> dict[str, None]:
    """Every module that has a parameter, in order."""
    return dict.fromkeys(name.rpartition(".")[0] for name in shapes if "." in name)


def _of_rules(
    rules: tuple[tuple[str, tuple[str, ...]], ...], shapes: Shapes, modules: Mapping[str, None]
) -> Iterator[tuple[str, Layer]]:
    for theirs, ours in rules:
        swap = ours[0][: len(ours[0]) - len(ours[0].lstrip("~?"))]
        templates = (ours[0][len(swap) :], *ours[1:])
        pattern = re.compile(
            re.escape(templates[0]).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{m\}", r"(?P<m>\d+)")
        )
        for match in filter(None, map(pattern.fullmatch, modules)):
            named = [template.format(**match.groupdict()) for template in templates]
            if all(name in modules for name in named):
                yield theirs.format(**match.groupdict()), _joined(named, swap, shapes)


def _joined(modules: list[str], swap: str, shapes: Shapes) -> Layer:
    if len(modules) == 1:
        rows, *columns = shapes.get(f"{modules[0]}.weight", (0,))
        return (
            Piece(modules[0], swapped=swap == "~" or (swap == "~?" and [rows] == [2 * n for n in columns])),
        )
    rows_of = [shapes[f"{module}.weight"][0] for module in modules]
    firsts = [0, *accumulate(rows_of)]
    return tuple(Piece(m, first, rows) for m, first, rows in zip(modules, firsts, rows_of, strict=False))


def _of_sgm(modules: Mapping[str, None]) -> Iterator[tuple[str, Layer]]:
    for theirs, ours in sgm_names(modules):
        yield theirs, (Piece(ours),)


def _of_spellings(modules: Mapping[str, None]) -> Iterator[tuple[str, Layer]]:
    for replaced in SPELLINGS:
        for module in modules:
            name = module
            for ours, theirs in replaced:
                name = name.replace(ours, theirs)
            if name != module:
                yield name, (Piece(module),)


def _processors(name: str) -> Iterator[str]:
    """diffusers' first spelling: `attn1.processor.to_q_lora` for attn1.to_q."""
    parent, _, leaf = name.removesuffix(".0").rpartition(".")
    if parent and leaf.startswith(("to_", "add_")):
        yield f"{parent}.processor.{leaf}_lora"


def _flat(found: Mapping[str, Layer], own: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same names with `_` for every dot, those that stand for one layer only; our own names come first."""
    flat: dict[str, set[Layer]] = {}
    for name, layer in found.items():
        flat.setdefault(name.replace(".", "_"), set()).add(layer)
    exact = {name.replace(".", "_"): layer for name, layer in own.items()}
    return {
        name: exact.get(name, next(iter(layers)))
        for name, layers in flat.items()
        if name in exact or len(layers) == 1
    }
