"""`diffc validate --bisect`: which modules of a compiled graph are off, each by itself.

The graph is cut at the last value of every module. Each piece is fed what the reference gives at the cuts in front of
it, so an error shows where it is made and nowhere behind: what is first in the list is the first that is wrong.
Pieces run in chunks whose values fit into a fixed memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from diffc.errors import MismatchError
from diffc.progress import Update
from diffc.validate.cuts import HERE, OUTPUT, Point, cut, nodes_behind, points_of
from diffc.validate.float32 import cpu_session, feed, float32_twin, smooth_twin
from diffc.validate.onnx_reference import GraphReference
from diffc.validate.reports import SMOOTH, Sizes
from diffc.validate.tolerances import PIECE_REL_L2, tolerance_of
from diffc.validate.torch_hooks import softmax_scale
from diffc.validate.torch_reference import FLOOR_RUNS, Reference

Array = npt.NDArray[Any]
MEMORY = 1 << 30
"""Bytes of the reference's values that a chunk of pieces may hold."""


@dataclass(frozen=True)
class Finding:
    """A piece that is off: the point that it ends at, its relative L2 error and limit, and the nodes in it.

    `error` is infinite where NaN, or something in the place of zeros, came out.
    """

    point: Point
    error: float
    limit: float
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Bisection:
    """What one pass over a graph found. `chance` counts pieces whose error roundings of their inputs explain."""

    arithmetic: str
    shape: Sizes
    pieces: int
    chance: int
    findings: tuple[Finding, ...]


class Values(Protocol):
    """A reference that tells what its modules give."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of what each module gives, by module path; of tensors that are made once."""
        ...

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """What these modules give, in float32."""
        ...


@dataclass
class TorchValues:
    """The fake-quantized torch model, watched by hooks. Every `take` is a run."""

    reference: Reference
    shape: Any
    seed: int
    smooth: bool
    _calls: dict[str, int] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of floating-point tensors, from modules that ran once."""
        found: dict[str, tuple[int, ...]] = {}
        calls: dict[str, int] = {}

        def see(module: str, out: torch.Tensor) -> None:
            calls[module] = calls.get(module, 0) + 1
            found[module] = tuple(out.shape)

        self._run([name for name, _ in self.reference.model.named_modules() if name], see)
        return {name: shape for name, shape in found.items() if calls[name] == 1}

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """One run, that keeps the outputs of `modules`."""
        found: dict[str, Array] = {}

        def see(module: str, out: torch.Tensor) -> None:
            found[module] = out.detach().float().numpy().copy()

        self._run(modules, see)
        return found

    def _run(self, modules: Sequence[str], see: Any) -> None:
        watched = _watched(self.reference.model, modules, see)
        self.reference.forward(self.shape, self.seed, smooth=self.smooth, watched=watched)


@contextmanager
def _watched(model: torch.nn.Module, modules: Sequence[str], see: Any) -> Iterator[None]:
    """`see(module, output)` for every floating-point tensor that one of `modules` returns."""
    handles = []
    for name in modules:

        def hook(_: Any, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                see(name, out)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class GraphValues:
    """Another graph, cut at its own points."""

    def __init__(self, reference: GraphReference, shape: Any, seed: int, smooth: bool):
        self._twin = reference.twin(smooth=smooth)
        self._points = {point.module: point.tensor for point in points_of(self._twin)}
        drawn, _ = reference.outputs(shape, seed, smooth=smooth)
        self._arrays = {name: np.asarray(value.float().numpy()) for name, value in drawn.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every module of the graph."""
        return _shapes(self._twin, self._points, self._arrays)

    def take(self, modules: Sequence[str]) -> dict[str, Array]:
        """One run of the graph, with these values as outputs."""
        tensors = [self._points[module] for module in modules]
        part = cut(self._twin, tensors, {})
        with cpu_session(part) as session:
            out = session.run(_fed(part, self._arrays))
        return {m: np.asarray(out[t + HERE], np.float32) for m, t in zip(modules, tensors, strict=True)}


def bisect(
    model: onnx.ModelProto,
    reference: Reference | GraphReference,
    *,
    format: str,
    shape: Any,
    seed: int,
    update: Update = lambda done, total: None,
) -> list[Bisection]:
    """Every piece without rounding of activations, then with it. The graph must have the reference's module names."""
    scale = softmax_scale(model)
    plans = [("float32", False, tolerance_of(format, "float32"))]
    if reference.quantized:
        plans.insert(0, (SMOOTH, True, PIECE_REL_L2))
    found = []
    for arithmetic, smooth, limit in plans:
        twin = smooth_twin(model) if smooth else float32_twin(model)
        with reference.with_quantized_softmax(None if smooth else scale):
            drawn, expected = reference.outputs(shape, seed, smooth=smooth)
            arrays = {name: np.asarray(value.float().numpy()) for name, value in drawn.items()}
            values: Values
            if isinstance(reference, Reference):
                values = TorchValues(reference, shape, seed, smooth)
            else:
                values = GraphValues(reference, shape, seed, smooth)
            pieces = Pieces(twin, values, arrays, expected, max(limit, PIECE_REL_L2))
            found.append(pieces.examine(arithmetic, shape, update))
    return found


def require_no_finding(found: Sequence[Bisection], model: str, *, against: str, fix: str) -> None:
    """Raise MismatchError (exit code 3) naming the first module of the file `model` that is off by itself."""
    for bisection in (b for b in found if b.findings):
        first = bisection.findings[0]
        raise MismatchError(
            f"{first.point.module} of the compiled {model} differs from {against}: {first.point.node}"
            f" ({first.point.op}) is off by {first.error:.2e} at {bisection.shape} in"
            f" {bisection.arithmetic}, over the limit {first.limit:.0e}",
            fix=fix,
        )


class Pieces:
    """A graph in pieces, and the reference's values to feed them with.

    `arrays` are the inputs, `outputs` what the reference gives for them: the last pieces end there.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        values: Values,
        arrays: Mapping[str, Array],
        outputs: Mapping[str, Array],
        limit: float,
    ):
        self.model, self.values, self.arrays, self.limit = model, values, arrays, limit
        self._outputs = {OUTPUT + name: array for name, array in outputs.items()}
        theirs = values.shapes() | {name: array.shape for name, array in self._outputs.items()}
        candidates = [p for p in points_of(model) if p.module in theirs]
        ours = _shapes(model, {p.module: p.tensor for p in candidates}, arrays)
        self.points = [p for p in candidates if ours.get(p.module) == theirs[p.module]]
        self.ranks = {p.tensor: len(theirs[p.module]) for p in self.points}
        self._bytes = {p.module: 4 * int(np.prod(theirs[p.module])) for p in self.points}

    def examine(self, arithmetic: str, shape: Sizes, update: Update) -> Bisection:
        """Run every piece."""
        findings: list[Finding] = []
        chance = done = 0
        for chunk in self._chunks():
            off, by_chance = self._run(chunk)
            findings += off
            chance += by_chance
            done += len(chunk)
            update(done, len(self.points))
        return Bisection(arithmetic, shape, len(self.points), chance, tuple(findings))

    def _chunks(self) -> Iterator[list[Point]]:
        chunk: list[Point] = []
        size = 0
        for point in self.points:
            if chunk and size + self._bytes[point.module] > MEMORY:
                yield chunk
                chunk, size = [], 0
            chunk.append(point)
            size += self._bytes[point.module]
        if chunk:
            yield chunk

    def _run(self, chunk: Sequence[Point]) -> tuple[list[Finding], int]:
        """The pieces that are off, and how many more would be but for roundings of what they are fed."""
        part = cut(self.model, [p.tensor for p in chunk], self.ranks)
        fed = {value.name for value in part.graph.input}
        kept = [p for p in self.points if p.tensor in fed or p in chunk]
        expected = dict(zip((p.tensor for p in kept), self._taken(kept), strict=True))
        with cpu_session(part) as session:
            out = session.run(_fed(part, {**self.arrays, **expected}))
        off = [
            (p, error)
            for p in chunk
            if (error := _error(expected[p.tensor], out[p.tensor + HERE])) > self.limit
        ]
        # Without quantizers there is no chance in it.
        real = [(p, error) for p, error in off if not error <= 3 * self._floor(p, expected)]
        return [self._finding(p, error) for p, error in real], len(off) - len(real)

    def _taken(self, points: Sequence[Point]) -> list[Array]:
        inner = [p.module for p in points if p.module not in self._outputs]
        values = (self.values.take(inner) if inner else {}) | self._outputs
        return [values[p.module] for p in points]

    def _floor(self, point: Point, expected: Mapping[str, Array]) -> float:
        """Largest relative L2 change of a piece's value when all that it is fed is off by a float32 rounding."""
        part = cut(self.model, [point.tensor], self.ranks)
        inputs = _fed(part, {**self.arrays, **expected})
        rng = np.random.default_rng(0)
        with cpu_session(part) as session:
            before = session.run(inputs)[point.tensor + HERE]
            after = [
                session.run({n: _noisy(a, rng) for n, a in inputs.items()})[point.tensor + HERE]
                for _ in range(FLOOR_RUNS)
            ]
        return max(_error(before, other) for other in after)

    def _finding(self, point: Point, error: float) -> Finding:
        nodes = nodes_behind(self.model, point.tensor, set(self.ranks))
        return Finding(point, error, self.limit, tuple(nodes))


def _noisy(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype != np.float32:
        return array
    return (array * (1 + 2.0**-22 * rng.uniform(-1, 1, array.shape))).astype(np.float32)


def _fed(part: onnx.ModelProto, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return feed(part, {v.name: arrays[v.name] for v in part.graph.input})


def _shapes(
    model: onnx.ModelProto, tensors: Mapping[str, str], arrays: Mapping[str, Array]
) -> dict[str, tuple[int, ...]]:
    """The shapes that tensors have, by module, from one run that keeps nothing else."""
    part = cut(model, [], {}, set(tensors.values()))
    with cpu_session(part) as session:
        out = session.run(_fed(part, arrays))
    return {module: tuple(int(n) for n in out[tensor + HERE]) for module, tensor in tensors.items()}


def _error(expected: Array, result: Array) -> float:
    """||expected - result|| / ||expected||; infinite for NaN, and for anything in the place of zeros."""
    a, b = expected.astype(np.float64), result.astype(np.float64)
    difference, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(a))
    if not np.isfinite(difference):
        return float("inf")
    if norm == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / norm
