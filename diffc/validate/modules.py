"""`diffc validate --bisect`: which modules of a compiled graph are wrong, each by itself.

The graph is cut at the last value of every module. Each module is fed what the reference gives at the cuts before it,
so an error shows in the module that makes it and in none after it: the first one listed is the first that is wrong.
Modules run in chunks whose values fit into a fixed amount of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from diffc.errors import MismatchError
from diffc.models.spec import Shape
from diffc.progress import Update
from diffc.validate.cuts import COMPUTED, OUTPUT, ModuleValue, extract, module_values, nodes_computing
from diffc.validate.float32 import cpu_session, float32_copy, unrounded_copy
from diffc.validate.module_values import Array, ReferenceValues, inputs_of, shapes_in, values_of
from diffc.validate.onnx_reference import GraphReference
from diffc.validate.outputs import FLOOR_RUNS, as_float32, softmax_scale
from diffc.validate.reports import UNROUNDED, Sizes
from diffc.validate.tolerances import MODULE_REL_L2, tolerance_of
from diffc.validate.torch_reference import TorchReference

CHUNK_BYTES = 1 << 30
"""Bytes of the reference's values that one chunk of modules may hold."""


@dataclass(frozen=True)
class WrongModule:
    """A module that is wrong: its value, the relative L2 error and limit, and the nodes from the cuts before it.

    `error` is infinite where the graph gives NaN, or anything in the place of zeros.
    """

    value: ModuleValue
    error: float
    limit: float
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class ModuleReport:
    """What one look at every module found.

    `modules` were compared. `by_chance` of them are over the limit by no more than roundings of their inputs explain.
    """

    arithmetic: str
    shape: Sizes
    modules: int
    by_chance: int
    wrong: tuple[WrongModule, ...]


def compare_modules(
    model: onnx.ModelProto,
    reference: TorchReference | GraphReference,
    *,
    format: str,
    shape: Sizes,
    seed: int,
    update: Update = lambda done, total: None,
) -> list[ModuleReport]:
    """Every module by itself: without rounding of activations if the reference is quantized, then with it.

    The graph's nodes must be named after the reference's modules.
    """
    cases = [("float32", False, tolerance_of(format, "float32"))]
    if reference.quantized:
        cases.insert(0, (UNROUNDED, True, MODULE_REL_L2))
    found = []
    for arithmetic, unrounded, limit in cases:
        copy = unrounded_copy(model) if unrounded else float32_copy(model)
        with reference.with_quantized_softmax(softmax_scale(model), rounds=not unrounded):
            # A torch reference takes a Shape, a graph sizes by name; `shape` is what this one was made for.
            assert isinstance(shape, Shape) or isinstance(reference, GraphReference)
            drawn, expected = reference.outputs(shape, seed, unrounded=unrounded)  # type: ignore[arg-type]
            values = values_of(reference, shape, seed, unrounded=unrounded)
            modules = _Modules(copy, values, as_float32(drawn), expected, max(limit, MODULE_REL_L2))
            found.append(modules.compare(arithmetic, shape, update))
    return found


def require_right_modules(reports: Sequence[ModuleReport], model: str, *, against: str, fix: str) -> None:
    """Raise MismatchError (exit code 3) with the first module of the file `model` that is wrong by itself."""
    for report in (r for r in reports if r.wrong):
        first = report.wrong[0]
        raise MismatchError(
            f"{first.value.module} of the compiled {model} differs from {against}: {first.value.node}"
            f" ({first.value.op}) is off by {first.error:.2e} at {report.shape} in"
            f" {report.arithmetic}, over the limit {first.limit:.0e}",
            fix=fix,
        )


class _Modules:
    """A graph cut at its modules, and the reference's values to feed each of them with.

    `arrays` are the inputs of the graph, `outputs` what the reference gives for them.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        values: ReferenceValues,
        arrays: Mapping[str, Array],
        outputs: Mapping[str, Array],
        limit: float,
    ):
        self.model, self.reference, self.arrays, self.limit = model, values, arrays, limit
        self._outputs = {OUTPUT + name: array for name, array in outputs.items()}
        theirs = values.shapes() | {name: array.shape for name, array in self._outputs.items()}
        candidates = [v for v in module_values(model) if v.module in theirs]
        ours = shapes_in(model, {v.module: v.tensor for v in candidates}, arrays)
        # A fusion moves where a module ends: only values of the same shape are the same value.
        self.values = [v for v in candidates if ours.get(v.module) == theirs[v.module]]
        self.ranks = {v.tensor: len(theirs[v.module]) for v in self.values}
        self._bytes = {v.module: 4 * int(np.prod(theirs[v.module])) for v in self.values}

    def compare(self, arithmetic: str, shape: Sizes, update: Update) -> ModuleReport:
        """Run every module."""
        wrong: list[WrongModule] = []
        by_chance = done = 0
        for chunk in self._chunks():
            off, chance = self._run(chunk)
            wrong += off
            by_chance += chance
            done += len(chunk)
            update(done, len(self.values))
        return ModuleReport(arithmetic, shape, len(self.values), by_chance, tuple(wrong))

    def _chunks(self) -> Iterator[list[ModuleValue]]:
        chunk: list[ModuleValue] = []
        size = 0
        for value in self.values:
            if chunk and size + self._bytes[value.module] > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(value)
            size += self._bytes[value.module]
        if chunk:
            yield chunk

    def _run(self, chunk: Sequence[ModuleValue]) -> tuple[list[WrongModule], int]:
        """The modules that are wrong, and how many more differ by no more than roundings of their inputs explain."""
        part = extract(self.model, [v.tensor for v in chunk], self.ranks)
        fed = {value.name for value in part.graph.input}
        kept = [v for v in self.values if v.tensor in fed or v in chunk]
        expected = dict(zip((v.tensor for v in kept), self._reference_values(kept), strict=True))
        with cpu_session(part) as session:
            out = session.run(inputs_of(part, {**self.arrays, **expected}))
        errors = [(v, _error(expected[v.tensor], out[v.tensor + COMPUTED])) for v in chunk]
        off = [(v, error) for v, error in errors if error > self.limit]
        wrong = [(v, error) for v, error in off if not error <= 3 * self._floor(v, expected)]
        return [self._wrong(v, error) for v, error in wrong], len(off) - len(wrong)

    def _reference_values(self, values: Sequence[ModuleValue]) -> list[Array]:
        inner = [v.module for v in values if v.module not in self._outputs]
        found = (self.reference.take(inner) if inner else {}) | self._outputs
        return [found[v.module] for v in values]

    def _floor(self, value: ModuleValue, expected: Mapping[str, Array]) -> float:
        """Largest relative L2 change of a module's value when all that it is fed is off by a float32 rounding."""
        part = extract(self.model, [value.tensor], self.ranks)
        inputs = inputs_of(part, {**self.arrays, **expected})
        rng = np.random.default_rng(0)
        with cpu_session(part) as session:
            before = session.run(inputs)[value.tensor + COMPUTED]
            noisy = ({n: _noisy(a, rng) for n, a in inputs.items()} for _ in range(FLOOR_RUNS))
            after = [session.run(arrays)[value.tensor + COMPUTED] for arrays in noisy]
        return max(_error(before, other) for other in after)

    def _wrong(self, value: ModuleValue, error: float) -> WrongModule:
        nodes = nodes_computing(self.model, value.tensor, set(self.ranks))
        return WrongModule(value, error, self.limit, tuple(nodes))


def _noisy(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype != np.float32:
        return array
    return (array * (1 + 2.0**-22 * rng.uniform(-1, 1, array.shape))).astype(np.float32)


def _error(expected: Array, result: Array) -> float:
    """||expected - result|| / ||expected||; infinite for NaN, and for anything in the place of zeros."""
    a, b = expected.astype(np.float64), result.astype(np.float64)
    difference, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if not np.isfinite(difference):
        return float("inf")
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / norm
