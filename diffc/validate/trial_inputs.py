"""Sizes at which a graph of which nothing else is known runs, found by running it.

A graph from elsewhere says which dimensions are dynamic, not which sizes fit: a UNet wants multiples of 8 rows, a
transformer as many positions as tokens, and some exports run at the traced size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import onnx

from diffc.errors import DiffcError
from diffc.validate.float32 import Arrays
from diffc.validate.passes import random_array

Sizes = Mapping[str, int]
"""Sizes of dynamic dimensions by name."""
_DRAWS = 2
"""Sets of inputs at which a graph is compared."""
_SMALL = 1 << 17
"""Elements of all inputs up to which sizes of the user come first; larger ones take minutes on a CPU."""
_LARGEST = 1 << 24
"""Elements of all inputs above which nothing is tried."""
_MORE = 20
"""Further sizes that are tried."""
_STEPS = (2, 4, 8, 16, 32, 64)


def named_dimensions(model: onnx.ModelProto) -> dict[str, list[str | int]]:
    """The dimensions of every graph input: names of the dynamic ones, sizes of the others."""
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    }


def dynamic_names(model: onnx.ModelProto) -> list[str]:
    """Names of the dynamic dimensions of the inputs, in graph order."""
    dims = [d for dims in named_dimensions(model).values() for d in dims]
    return list(dict.fromkeys(d for d in dims if isinstance(d, str)))


def followers(model: onnx.ModelProto) -> dict[str, str]:
    """Dimensions that are the whole shape of an input and occur nowhere else -> the batch, which they follow.

    Exporters give the timestep an axis of its own; the graph spreads it over the batch.
    """
    dims = named_dimensions(model)
    whole = {shape[0] for shape in dims.values() if len(shape) == 1}
    elsewhere = {d for shape in dims.values() if len(shape) > 1 for d in shape}
    batches = [shape[0] for shape in dims.values() if len(shape) > 1 and isinstance(shape[0], str)]
    if not batches:
        return {}
    return {d: str(batches[0]) for d in whole - elsewhere if isinstance(d, str)}


def open_dimensions(model: onnx.ModelProto, sizes: Mapping[str, object]) -> list[str]:
    """The dynamic dimensions that have no size among `sizes`, and follow no other."""
    follows = followers(model)
    return [name for name in dynamic_names(model) if name not in sizes and name not in follows]


def sizes_to_try(model: onnx.ModelProto, given: Sequence[Sizes] = ()) -> Iterator[Sizes]:
    """Sizes of the dynamic dimensions, the likeliest first; `given` are those of the user's profile.

    Sizes that differ from dimension to dimension come before equal ones: equal sizes hide axes that were mixed up.
    """
    names, follows = dynamic_names(model), followers(model)
    batches = {shape[0] for shape in named_dimensions(model).values() if len(shape) > 1}
    rest = [name for name in names if name not in batches and name not in follows]
    leading = [name for name in names if name in batches and name not in follows]

    def all_sizes() -> Iterator[Sizes]:
        yield from (sizes for sizes in given if _elements(model, sizes) <= _SMALL)
        for batch, unit, turn in ((2, 8, 0), (3, 8, 1), (2, 1, 0), (3, 1, 1)):
            order = [unit * (2 + (i + turn) % max(1, len(rest))) for i in range(len(rest))]
            yield dict.fromkeys(leading, batch) | dict(zip(rest, order, strict=True))
        for size in _STEPS:
            yield dict.fromkeys(names, size)
        for size in _STEPS:
            yield dict.fromkeys(names, size) | dict.fromkeys(leading, 1)
        yield from given

    for sizes in all_sizes():
        for following in ({n: sizes[b] for n, b in follows.items() if b in sizes}, dict.fromkeys(follows, 1)):
            complete = {
                **dict.fromkeys(names, 1),
                **following,
                **{n: s for n, s in sizes.items() if n in names},
            }
            complete |= {n: s for n, s in following.items() if sizes not in given or n not in sizes}
            if _elements(model, complete) <= _LARGEST:
                yield complete


def _elements(model: onnx.ModelProto, sizes: Sizes) -> int:
    shapes = named_dimensions(model).values()
    return sum(math.prod(sizes.get(d, 1) if isinstance(d, str) else d for d in dims) for dims in shapes)


@dataclass
class TrialInputs:
    """Random inputs at sizes at which the graph runs; looked for with the first graph that opens.

    `interface` is the model whose inputs are fed, `given` are sizes of the user's profile. `sizes` are those of the
    inputs that were found, `failed` those at which the graph did not run, and why; `searches` says in how many graphs
    more sizes may still be looked for.
    """

    interface: onnx.ModelProto
    given: Sequence[Sizes] = ()
    seed: int = 0
    sizes: list[Sizes] = field(default_factory=list)
    failed: list[tuple[Sizes, str]] = field(default_factory=list)
    searches: int = 2
    _found: list[Arrays] = field(default_factory=list)

    def run(self, run: Callable[[Arrays], Any], more: Iterable[Sizes] = ()) -> list[Any]:
        """What `run` gives for each set of inputs; `more` are sizes to try when it runs at none of the usual ones.

        Raises DiffcError when it runs at none of the sizes tried.
        """
        if self._found:
            return [run(values) for values in self._found]
        results, problem = list[Any](), "it has no inputs"
        self.failed.clear()
        for sizes in chain(self._distinct(), self._unless(results, more)):
            values = self._draw(sizes)
            try:
                results.append(run(values))
            except DiffcError as error:
                problem = error.what
                self.failed.append((sizes, problem))
                continue
            self._found.append(values)
            self.sizes.append(sizes)
            if len(results) == _DRAWS:
                return results
        if not results:
            raise DiffcError(
                f"it runs at none of the sizes tried, the last: {problem}",
                fix="give sizes with --shape or --profile",
            )
        return results

    def _unless(self, results: Sequence[Any], more: Iterable[Sizes]) -> Iterator[Sizes]:
        """The first of `more` as long as there are no results."""
        for sizes in islice(more if not results else (), _MORE):
            complete = dict.fromkeys(dynamic_names(self.interface), 1) | dict(sizes)
            if not results and _elements(self.interface, complete) <= _LARGEST:
                yield complete

    def _distinct(self) -> Iterator[Sizes]:
        """Sizes to try, each once; the same twice where nothing is dynamic."""
        if not dynamic_names(self.interface):
            yield from [{}] * _DRAWS
            return
        seen = []
        for sizes in sizes_to_try(self.interface, self.given):
            if sizes not in seen:
                seen.append(sizes)
                yield sizes

    def _draw(self, sizes: Sizes) -> Arrays:
        rng = np.random.default_rng((self.seed, len(self._found)))
        return {v.name: random_array(v, dict(sizes), rng, 1) for v in self.interface.graph.input}
