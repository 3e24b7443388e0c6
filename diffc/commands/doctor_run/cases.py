"""What of an artifact can be run: each engine and each graph that a runtime takes, and at which inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffc.artifact.folder import Artifact
from diffc.backends.onnx_graph import read
from diffc.backends.signature import Signature
from diffc.backends.target import RUNTIMES
from diffc.models.inputs import random_inputs
from diffc.models.registry import family_of_manifest
from diffc.models.sizes import size_of
from diffc.models.spec import Shape
from diffc.runtime.cached import single_model
from diffc.validate.compare import read_arrays
from diffc.validate.comparisons import shapes_of
from diffc.validate.outputs import as_float32
from diffc.validate.reports import UNROUNDED, GraphSizes, Sizes, case_name

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One file that `target` runs: an engine for the compute capabilities `sms`, or a graph.

    `graph` is the ONNX file that it computes, `number` its place among the models of a cache plan, None for the whole
    backbone.
    """

    target: str
    file: str
    graph: str
    number: int | None = None
    sms: tuple[int, ...] = ()

    @property
    def is_engine(self) -> bool:
        """Whether it was built for a GPU."""
        return RUNTIMES[self.target].is_engine


@dataclass(frozen=True)
class Sample:
    """Inputs in float32 by name, and torch's outputs for them where the compile kept some.

    `floor`: how far roundings alone were found to move these outputs at the compile.
    """

    label: str
    inputs: Arrays
    torch: Arrays | None = None
    floor: float = 0.0


def cases(artifact: Artifact, target: str | None = None) -> list[Case]:
    """Everything that can be run, in the order of the runtimes; of `target` alone where it is given."""
    models: list[tuple[int | None, Artifact]] = [(None, artifact)]
    for number in range(len(artifact.manifest.get("cache", {}).get("models", ()))):
        models.append((number, part(artifact, number)))
    return [
        case
        for name in RUNTIMES
        if target in (None, name) and RUNTIMES[name].file_of in artifact.manifest["targets"]
        for number, model in models
        for case in _cases(artifact, name, number, model)
    ]


def part(artifact: Artifact, number: int | None) -> Artifact:
    """The artifact with one model of its cache plan; itself for None."""
    if number is None:
        return artifact
    return single_model(artifact, artifact.manifest["cache"]["models"][number])


def _cases(artifact: Artifact, name: str, number: int | None, model: Artifact) -> Iterator[Case]:
    target = RUNTIMES[name]
    graph = model.manifest["targets"][target.file_of]
    if not target.is_engine:
        yield Case(name, graph, graph, number)
        return
    suffixes = [entry["suffix"] for entry in artifact.manifest.get("cache", {}).get("models", ())]
    for engine in (e for e in model.manifest["engines"] if e["target"] == name):
        of_a_part = any(PurePosixPath(engine["file"]).stem.endswith(suffix) for suffix in suffixes)
        if number is not None or not of_a_part:
            yield Case(name, engine["file"], graph, number, tuple(engine["sms"]))


def samples(artifact: Artifact, case: Case) -> list[Sample]:
    """The inputs at which a case is run: those of the artifact's validation, else random ones at the same shapes."""
    kept = list(_kept(artifact, case.graph)) if case.number is None else []
    return kept or list(_drawn(artifact, case))


def _kept(artifact: Artifact, graph: str) -> Iterator[Sample]:
    """The files in validation/ for a graph: of each shape, those of the arithmetic that comes last."""
    folder, reports = artifact.folder / "validation", {}
    for report in artifact.manifest["validation"]:
        if report["model"] == graph and report["arithmetic"] != UNROUNDED and "height" in report["shape"]:
            reports[str(report["shape"])] = report
    for report in reports.values():
        name = case_name(graph, Shape(**report["shape"]), report["arithmetic"])
        inputs, outputs = folder / f"{name}-inputs.json", folder / f"{name}-torch.json"
        if inputs.is_file() and outputs.is_file():
            label = str(Shape(**report["shape"]))
            yield Sample(label, read_arrays(inputs), read_arrays(outputs), report["floor"] or 0.0)


def _drawn(artifact: Artifact, case: Case) -> Iterator[Sample]:
    """Random inputs at the shapes of a validation, inside the profile."""
    seed = int(artifact.manifest.get("request", {}).get("seed", 0)) + 1
    signature = Signature.of(part(artifact, case.number).manifest)
    whole = artifact.manifest["targets"][RUNTIMES[case.target].file_of]
    for shape in shapes_of(artifact, read(artifact.present(whole)), (), case.target):
        sizes, known = _of_shape(artifact, shape, seed)
        rng = np.random.default_rng(seed)
        drawn = {
            value.name: rng.standard_normal([size_of(dim, sizes) for dim in value.dims]).astype(np.float32)
            for value in signature.inputs
        }
        yield Sample(str(shape), {name: known.get(name, array) for name, array in drawn.items()})


def _of_shape(artifact: Artifact, shape: Sizes, seed: int) -> tuple[Mapping[str, int], Arrays]:
    """The sizes of the dynamic dimensions at `shape`, and values for the inputs of a family's backbone."""
    if isinstance(shape, GraphSizes):
        return dict(shape.dims), {}
    described = artifact.manifest["model"]
    spec, config = family_of_manifest(described), described["config"]
    values = random_inputs(spec, config, shape, dtype=torch.float32, seed=seed)
    return spec.sizes(shape), as_float32(values)
