"""What a pass is: a frozen dataclass whose name and fields are its command-line syntax.

A pass rewrites a `gs.Graph` in place and says how much it changed. It never checks, times or dumps: the
runner in `passes.pipeline` does. A rewrite that must not fire is a `Refusal`, a value with a reason.

Weights: a `gs.Constant` whose values are a `passes.weights.recipe.RecipeValues` has no data in memory, only a
recipe. A pass edits recipes; it never evaluates one. Small constants hold their values inline.
"""

from __future__ import annotations

import gc
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, TypeVar

import onnx_graphsurgeon as gs


class PassError(ValueError):
    """The user can fix it: an unknown pass, a bad option, a model that a pass cannot take."""


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
RENAMED = {
    "keep-digits": "keep-float32",
    "patches-as-product": "rewrite-patches",
    "smooth-qdq": "drop-rounding",
}
"""Old names of passes -> the names that took their place. Version 0.3 of diffc removes the old ones."""
_FOLDERS = ("canonical", "importing", "targets", "cache")
"""Where passes lie. A file of another name than its pass is a part of its neighbours and registers nothing."""


def register(cls: P) -> P:
    """Class decorator: make the pass known by its name to `Pipeline.parse` and `diffc passes`.

    Raises TypeError when the name is empty or belongs to another class.
    """
    known = _REGISTRY.get(cls.name)
    if not cls.name or (known is not None and known.__module__ != cls.__module__):
        raise TypeError(f"pass name {cls.name!r} is empty or taken")
    _REGISTRY[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sorted: imports all files in the folders of passes."""
    for module in _modules():
        importlib.import_module(module)
    return dict(sorted(_REGISTRY.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name; imports its file alone. Raises PassError that lists the known ones.

    A name of `RENAMED` gives the pass that took its place, and a DeprecationWarning.
    """
    if name in RENAMED:
        warnings.warn(f"pass {name!r} is called {RENAMED[name]!r} now", DeprecationWarning, stacklevel=2)
        name = RENAMED[name]
    if name not in _REGISTRY:
        for module in _modules():
            if module.rpartition(".")[2] == name.replace("-", "_"):
                importlib.import_module(module)
    if name not in _REGISTRY:
        raise PassError(f"unknown pass {name!r}. Known passes: {', '.join(all_passes())}")
    return _REGISTRY[name]


@lru_cache(maxsize=1)
def _modules() -> tuple[str, ...]:
    """The dotted names of all files in the folders of passes."""
    root = Path(__file__).parent
    files = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*.py")))
    return tuple(
        ".".join(("passes", *file.relative_to(root).with_suffix("").parts))
        for file in files
        if file.stem != "__init__"
    )


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
