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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import onnx_graphsurgeon as gs

from passes.plugins import Broken, named, open_plugin


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
    outputs after those there are, adds inputs, and may drop inputs.
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
GROUP = "passes"
"""The entry points by which an installed package adds passes: name of the pass -> "module:Class"."""
_FOLDERS = ("canonical", "importing", "targets", "cache")
"""Where passes lie. A file of another name than its pass is a part of its neighbours and registers nothing."""


def register(cls: P) -> P:
    """Class decorator: make the pass known by its name to `Pipeline.parse` and `diffc passes`.

    Raises TypeError when the name is empty or belongs to another class.
    """
    known = _REGISTRY.get(cls.name)
    owner = known.__module__ if known is not None else _modules().get(cls.name, cls.__module__)
    if not cls.name or owner != cls.__module__:
        raise TypeError(f"pass name {cls.name!r} is empty or taken")
    _REGISTRY[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name, sorted: imports all files in the folders of passes, and all plugins that work."""
    for module in _modules().values():
        importlib.import_module(module)
    plugins = {name: _plugin(name, points) for name, points in named(GROUP).items()}
    working = {name: plugin for name, plugin in plugins.items() if not isinstance(plugin, Broken)}
    return dict(sorted((_REGISTRY | working).items()))


def find_pass(name: str) -> type[Pass]:
    """The pass class of that name, ours or a plugin's; imports its file alone.

    A name of `RENAMED` gives the pass that took its place, and a DeprecationWarning. Raises PassError for a plugin
    that cannot be used, and for an unknown name, with the known ones.
    """
    if name in RENAMED:
        warnings.warn(f"pass {name!r} is called {RENAMED[name]!r} now", DeprecationWarning, stacklevel=2)
        name = RENAMED[name]
    if name not in _REGISTRY and name in _modules():
        importlib.import_module(_modules()[name])
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name not in (points := named(GROUP)):
        raise PassError(f"unknown pass {name!r}. Known passes: {', '.join(all_passes())}")
    plugin = _plugin(name, points[name])
    if isinstance(plugin, Broken):
        raise PassError(
            f"pass {name!r} is a plugin of {' and '.join(plugin.packages)}: {plugin.reason}"
            ". Fix: repair that package, or remove it: diffc doctor"
        )
    return plugin


def broken_plugins() -> tuple[Broken, ...]:
    """The passes of installed packages that cannot be used, each with the reason."""
    plugins = (_plugin(name, points) for name, points in named(GROUP).items())
    return tuple(plugin for plugin in plugins if isinstance(plugin, Broken))


def _plugin(name: str, points: Sequence[EntryPoint]) -> type[Pass] | Broken:
    """The pass that an installed package gives under this name."""

    def problem(value: Any) -> str:
        if not (isinstance(value, type) and issubclass(value, Pass)):
            return "it is not a subclass of passes.base.Pass"
        if value.name != name:
            return f"its name is {value.name!r}, and the entry point is called {name!r}"
        return f"passes itself has a pass {name!r}; choose another name" if name in _modules() else ""

    plugin: type[Pass] | Broken = open_plugin(points, problem)
    return plugin


@lru_cache(maxsize=1)
def _modules() -> dict[str, str]:
    """The files in the folders of passes: name of the pass that each may register -> dotted name of the module."""
    root = Path(__file__).parent
    files = (file for folder in _FOLDERS for file in sorted((root / folder).rglob("*.py")))
    return {
        file.stem.replace("_", "-"): ".".join(("passes", *file.relative_to(root).with_suffix("").parts))
        for file in files
        if file.stem != "__init__"
    }


def bodies_of(graph: gs.Graph) -> list[gs.Graph]:
    """The bodies of the graph's own nodes (If, Loop, Scan)."""
    body_of = gs.Graph
    return [
        value
        for node in graph.nodes
        if node.attrs
        for value in node.attrs.values()
        if isinstance(value, body_of)
    ]


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every body (of If, Loop, Scan) below it, outermost first."""
    yield graph
    for body in bodies_of(graph):
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
