"""What a pass is: a frozen dataclass whose name and fields are its command-line syntax.

A pass rewrites a `gs.Graph` in place and says how much it changed. It never checks, times or dumps: the
runner in `passes.pipeline` does. A rewrite that must not fire is a `Refusal`, a value with a reason.

Weights: a `gs.Constant` whose values are a `passes.weights.RecipeValues` has no data in memory, only a
recipe. A pass edits recipes; it never evaluates one. Small constants hold their values inline.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import onnx_graphsurgeon as gs


class PassError(ValueError):
    """The user can mend it: an unknown pass, a bad option, a model that a pass cannot take."""


class PassCheckError(PassError):
    """A pass left an invalid graph or changed numbers beyond its tolerance. Names pass, node and tensor."""


@dataclass(frozen=True)
class Refusal:
    """A place where a pass could have fired and must not, with the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """How many places were changed, what to tell the user, and where the pass declined."""

    changed: int = 0
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = field(default=())


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses are frozen dataclasses and registered with `@register`.

    `name` is verb-first kebab-case and equals the file name. `tolerance` is the relative L2 error that the
    rewrite may cause in a model output, 0.0 when it only moves or folds (then outputs agree to rounding).
    `changes_types`: graph inputs and outputs may get other element types. `changes_interface`: the pass adds
    outputs behind those there are, adds inputs, and may drop inputs.
    """

    name: ClassVar[str] = ""
    tolerance: ClassVar[float] = 0.0
    changes_types: ClassVar[bool] = False
    changes_interface: ClassVar[bool] = False

    @property
    def drops_outputs(self) -> bool:
        """Whether, beyond `changes_interface`, outputs may go as well: the pass leaves a part of the graph."""
        return False

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite `graph` in place. Idempotent: a second run changes nothing."""
        raise TypeError(f"{type(self).__name__} does not define run() for {graph.name}")


P = TypeVar("P", bound=type[Pass])
_REGISTRY: dict[str, type[Pass]] = {}


def register(cls: P) -> P:
    """Class decorator: make the pass known by its name to `Pipeline.parse` and `diffc passes`."""
    if not cls.name or cls.name in _REGISTRY:
        raise TypeError(f"pass name {cls.name!r} is empty or taken")
    _REGISTRY[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by name, sorted."""
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name. Raises PassError that lists the known ones."""
    if name not in _REGISTRY:
        raise PassError(f"unknown pass {name!r}. Known passes: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph (bodies of If, Loop, Scan) below it, outermost first."""
    yield graph
    body_of = gs.Graph
    bodies = [
        value
        for node in graph.nodes
        if node.attrs
        for value in node.attrs.values()
        if isinstance(value, body_of)
    ]
    for body in bodies:
        yield from walk(body)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from searching a large graph again and again while it is built or changed.

    What is dropped meanwhile in cycles stays in memory until the end: about one copy of the graph for a pipeline.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
