"""`diffc bench`: the same step on every side, taken in turns, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import Artifact
from diffc.artifact.model import compiled_model
from diffc.commands.bench.sides import SIDES, Setup
from diffc.commands.bench.worker import First, Memory, SideError, Worker
from diffc.errors import DiffcError, UsageError, unknown_value
from diffc.models.profiles import ShapeProfile
from diffc.models.registry import family_of_manifest
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.models.spec import Shape
from diffc.paths import AnyPath, Converted, as_path, as_text_or_none, as_texts_or_none
from diffc.progress import Reporter, Update, estimated
from diffc.progress_bar import default_reporter
from diffc.validate.shapes import parse_shape

WARM_UP = 2
_LOADING = 10.0
"""Seconds that loading a side takes at least: the import of torch and diffusers in its process."""
SETTLE = 0.02
"""Seconds between two sides: ONNX Runtime's threads look for work for a while after a call."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. `shapes` are texts of --shape; none means the profile's optimum.

    `against`: sides beside the compiled one; None is all, and none where an artifact of an ONNX file has no `model`.
    `model` is where the torch model lies now, None for where the compile found it; `target` None is the one that
    `diffc.load` takes. `device` None is the GPU if there is one. `cuda_graph` is that of `diffc.load`.
    `hub` says which files of the torch model are read.
    """

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    against: Converted[str | Iterable[str] | None, tuple[str, ...] | None] = Converted(as_texts_or_none, None)
    target: str | None = None
    device: str | None = None
    model: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    shapes: tuple[str, ...] = ()
    repeat: int = 20
    seed: int = 0
    cuda_graph: bool = False
    hub: HubOptions = DEFAULT_HUB

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides beside the compiled one; "none" in `against` stands for no side."""
        asked = SIDES if self.against is None else self.against
        return tuple(name for name in dict.fromkeys(asked) if name != "none")


@dataclass(frozen=True)
class Row:
    """One side at one shape. Seconds of every measured call, in order; `reason` says why there are none.

    `first` is the first call at this shape, with all compiling. `rel_l2` is the difference of its output to the first
    torch side's; None for that side itself. Memory is the peak so far of the side's process.
    """

    side: str
    shape: Shape
    seconds: tuple[float, ...] = ()
    first: float | None = None
    memory: Memory | None = None
    rel_l2: float | None = None
    reason: str = ""

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the seconds."""
        low, middle, high = np.percentile(self.seconds, (25, 50, 75))
        return float(low), float(middle), float(high)


def bench(request: BenchRequest, ui: Reporter | None = None) -> list[Row]:
    """Measure every side at every shape; rows by shape, the compiled backbone first.

    A side that fails has a row that says why, and the others go on. Raises DiffcError for a request that cannot be
    measured, before anything is loaded.
    """
    ui = ui or default_reporter()
    artifact = Artifact.load(request.artifact)
    if is_imported(artifact) and request.against is None and request.model is None:
        ui.note(
            "compiled from an ONNX file: without --model DIR there is no torch model to measure beside it"
        )
        request = replace(request, against=("none",))
    setup, shapes = plan(artifact, request)
    rows: list[Row] = []
    with Sides() as sides:
        for name in ("compiled", *request.sides):
            with ui.stage(f"load {name}") as update, estimated(update, _LOADING):
                sides.load(name, setup)
        for shape in shapes:
            with ui.stage(f"measure at {shape}") as update:
                rows += sides.measure(shape, request, update)
    return rows


def require_measured(rows: Sequence[Row], asked: Sequence[str]) -> None:
    """Raise DiffcError when the compiled side has no figures, or one that was `asked` for by name."""
    for row in rows:
        if row.reason and row.side in ("compiled", *asked):
            raise DiffcError(
                f"{row.side} was not measured at {row.shape}: {row.reason}",
                fix="leave that side out, or mend what it says",
            )


def plan(artifact: Artifact, request: BenchRequest) -> tuple[Setup, list[Shape]]:
    """What the sides are given, and the shapes. Raises DiffcError for what cannot be measured."""
    import torch

    manifest = artifact.manifest
    if "family" not in manifest["model"]:
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file, whose inputs are those of no family that diffc knows",
            fix="measure an artifact that was compiled from a diffusers model",
        )
    for name in request.sides:
        if name not in SIDES:
            raise unknown_value("side", name, SIDES)
    if request.repeat < 1:
        raise UsageError(f"--repeat is {request.repeat}", fix="measure at least once")
    spec, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    usual = ShapeProfile.of_manifest(manifest["profile"]).optimum
    shapes = [parse_shape(text, spec, config, usual) for text in request.shapes] or [usual]
    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if request.sides and request.model is None and is_imported(artifact):
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file, which does not say where its torch model is",
            fix="name the torch model: --model DIR, or give --against none",
        )
    if request.sides:
        compiled_model(artifact, request.model, "--model DIR", request.hub)
    compiled_from = manifest.get("request", {})
    model = request.model or compiled_from.get("model", "")
    dtype = manifest["dtype"]
    recorded = DEFAULT_HUB if request.model else HubOptions.from_json(compiled_from.get("hub", {}))
    hub = request.hub.over(recorded)
    return Setup(artifact.folder, model, dtype, device, request.target, request.cuda_graph, hub), shapes


class Sides:
    """The processes of all sides, and why some have none."""

    def __init__(self) -> None:
        self._order: list[str] = []
        self._workers: dict[str, Worker] = {}
        self._failed: dict[str, str] = {}

    def load(self, name: str, setup: Setup) -> None:
        """Start a side, or note why it does not start."""
        self._order.append(name)
        try:
            self._workers[name] = Worker(name, setup)
        except SideError as error:
            self._failed[name] = str(error)

    def measure(self, shape: Shape, request: BenchRequest, update: Update) -> list[Row]:
        """Every side prepared, then measured in turns; one row for each, in the order of loading."""
        first: dict[str, First] = {}
        seconds: dict[str, list[float]] = {name: [] for name in self._order}
        total = len(self._order) + request.repeat
        for number, name in enumerate(self._order):
            with self._kept(name):
                if name in self._workers:
                    first[name] = self._workers[name].prepare(shape, request.seed, WARM_UP)
            update(number + 1, total)
        for turn in range(request.repeat):
            for name in self._order:
                with self._kept(name):
                    if name in self._workers:
                        time.sleep(SETTLE)
                        seconds[name].append(self._workers[name].measure())
            update(len(self._order) + turn + 1, total)
        return [self._row(name, shape, first, seconds[name]) for name in self._order]

    def _row(self, name: str, shape: Shape, first: Mapping[str, First], seconds: Sequence[float]) -> Row:
        if name in self._failed:
            return Row(name, shape, reason=self._failed[name])
        reference = next((n for n in self._order if n != "compiled" and n in first), name)
        differs = None if name == reference else _rel_l2(first[reference].output, first[name].output)
        memory = self._workers[name].memory()
        return Row(name, shape, tuple(seconds), first[name].seconds, memory, differs)

    @contextmanager
    def _kept(self, name: str) -> Iterator[None]:
        """A side that fails in here is measured no more."""
        try:
            yield
        except SideError as error:
            self._failed[name] = str(error)
            self._workers.pop(name).close()

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.close()


def _rel_l2(reference: npt.NDArray[Any], result: npt.NDArray[Any]) -> float:
    a, b = reference.astype(np.float64), result.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))
