"""Compare a compiled cached run with torch's under the same plan: two steps, of which the second uses the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn

from diffc.backends.onnxruntime.arrays import OrtSession
from diffc.cache.chain import run_chain
from diffc.cache.plan import Steps
from diffc.cache.resolve import ResolvedCache
from diffc.cache.torch_apply import apply
from diffc.compile.cached.variants import CacheBuild, Variant
from diffc.models.spec import Shape
from diffc.progress import Reporter
from diffc.validate.float32 import cpu_session, feed, float32_copy, runs_on_cpu, unrounded_copy
from diffc.validate.outputs import validate_session
from diffc.validate.reports import UNROUNDED, ShapeReport
from diffc.validate.tolerances import UNROUNDED_REL_L2, tolerance_of
from diffc.validate.torch_reference import TorchReference
from passes.storage import load

Arrays = Mapping[str, npt.NDArray[Any]]
_EARLIER = 1.25
"""Time of the first step, in times of the second."""


class TwoSteps(nn.Module):
    """A torch backbone that runs two steps: a first one that it makes up, and the one that it is given.

    The second step uses what the groups `reuse` kept in the first.
    """

    def __init__(self, backbone: nn.Module, plan: ResolvedCache, reuse: Sequence[int]):
        super().__init__()
        self.backbone = backbone
        groups = (
            replace(g, steps=Steps(listed=(1,) if i in reuse else ())) for i, g in enumerate(plan.groups)
        )
        self._plan = replace(plan, groups=tuple(groups))

    def forward(self, **kwargs: Any) -> Any:
        """The output of the second step."""
        with apply(self.backbone, self._plan):
            self.backbone(**first_step(kwargs))
            return self.backbone(**kwargs)


class TwoStepSession:
    """The two steps in compiled models: one that runs all blocks, then one that uses what the first kept."""

    def __init__(self, full: onnx.ModelProto, reduced: onnx.ModelProto, opened: Sequence[OrtSession]):
        self._models, self._sessions = (full, reduced), opened

    def run(self, given: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The backbone's output of the second step."""
        kept = self._sessions[0].run(feed(self._models[0], first_step(given)))
        found = self._sessions[1].run(feed(self._models[1], {**given, **kept}))
        return {name: array for name, array in found.items() if not name.startswith("cached_")}


class TwoStepChain:
    """The two steps in a chain of segments; the second step leaves out those of the groups `reuse`."""

    def __init__(
        self,
        build: CacheBuild,
        models: Sequence[onnx.ModelProto],
        opened: Sequence[OrtSession],
        reuse: frozenset[int],
    ):
        self._build, self._reuse = build, reuse
        suffixes = (variant.suffix for variant in build.variants)
        self._parts = dict(zip(suffixes, zip(models, opened, strict=True), strict=True))

    def run(self, given: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The backbone's output of the second step."""
        held: dict[str, npt.NDArray[Any]] = {}
        self._step(first_step(given), held, frozenset())
        flow = self._step(given, held, self._reuse)
        assert self._build.whole is not None
        name = self._build.whole.graph.output[
            0
        ].name  # the backbone's only one; tensors that cross come after it
        return {name: flow[name]}

    def _step(
        self, given: Arrays, held: dict[str, npt.NDArray[Any]], reuse: frozenset[int]
    ) -> dict[str, npt.NDArray[Any]]:
        def run(part: Variant, flow: Arrays) -> Arrays:
            model, session = self._parts[part.suffix]
            found: Arrays = session.run(feed(model, flow))
            return found

        return run_chain(self._build.variants, self._build.kept, reuse, given, held, run)


def first_step(given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of an earlier step: other latents (negated and mirrored, exact in every type), a larger time."""
    earlier = dict(given)
    name = "sample" if "sample" in given else "hidden_states"
    latents = given[name]
    earlier[name] = -latents.flip(-1) if isinstance(latents, Tensor) else -np.flip(latents, -1)
    earlier["timestep"] = given["timestep"] * np.float32(_EARLIER)
    return earlier


@dataclass(frozen=True)
class _Case:
    """An arithmetic, its limit, and the models in it: the one without a plan, and those that run the two steps."""

    arithmetic: str
    models: tuple[onnx.ModelProto, ...]
    limit: float


@dataclass(frozen=True)
class _Subject:
    """The files that run the two steps, a pair or a chain, and what reports call them."""

    name: str
    reuse: frozenset[int]
    files: tuple[str, ...]


def validate_cached(
    folder: Path,
    build: CacheBuild,
    reference: TorchReference,
    *,
    format: str,
    shapes: Sequence[Shape],
    seed: int,
    ui: Reporter,
) -> list[ShapeReport]:
    """Compare compiled cached steps with torch cached steps, for each set of groups that is used again.

    At the `shapes` and within the limits of a compile. The models' files are in `folder`. Reports are called after
    the reduced model's file, or after the segments'.
    """
    reports: list[ShapeReport] = []
    with ui.stage("validate cached steps against torch"):
        for subject in _subjects(build):
            reports += _validate(subject, folder, build, reference, format, shapes, seed)
    return reports


def _validate(
    subject: _Subject,
    folder: Path,
    build: CacheBuild,
    reference: TorchReference,
    format: str,
    shapes: Sequence[Shape],
    seed: int,
) -> list[ShapeReport]:
    two_steps = TwoSteps(reference.model, build.plan, sorted(subject.reuse))
    stepping = TorchReference(reference.source, reference.dtype, None, model=two_steps)
    stepping.quantized = reference.quantized
    plain = load(folder / "model.onnx")  # says what a step is given, and how attention is quantized
    models = (plain, *(load(folder / file) for file in subject.files))
    found = [
        report
        for case in _cases(models, reference, format)
        for report in _run(case, build, subject.reuse, stepping, shapes, seed)
    ]
    return [replace(report, model=subject.name) for report in found]


def _subjects(build: CacheBuild) -> Iterator[_Subject]:
    """The pairs or chains of files that targets run; each once, though targets share them."""
    seen = set()
    for target in build.variants[0].files:
        for number, reuse in enumerate(build.plan.reuse_sets(), 1):
            if build.layout == "segments":
                files = tuple(v.files[target] for v in build.variants)
                name = files[0].replace(build.variants[0].suffix, f"-parts-reuse-{number}")
            else:
                reduced = next(v for v in build.variants[1:] if frozenset(v.reuse) == reuse)
                files = (build.variants[0].files[target], reduced.files[target])
                name = files[1]
            if (files, reuse) not in seen:
                seen.add((files, reuse))
                yield _Subject(name, reuse, files)


def _cases(models: tuple[onnx.ModelProto, ...], reference: TorchReference, format: str) -> list[_Case]:
    copies = tuple(float32_copy(m) if reference.dtype != "float32" else m for m in models)
    cases = [_Case("float32", copies, tolerance_of(format, "float32"))]
    if reference.quantized:
        cases.insert(0, _Case(UNROUNDED, tuple(map(unrounded_copy, models)), UNROUNDED_REL_L2))
    if reference.dtype == "float16" and all(runs_on_cpu(m) for m in models):
        cases.append(_Case("float16", models, tolerance_of(format, "float16")))
    return cases


def _run(
    case: _Case,
    build: CacheBuild,
    reuse: frozenset[int],
    reference: TorchReference,
    shapes: Sequence[Shape],
    seed: int,
) -> list[ShapeReport]:
    plain, *models = case.models
    with ExitStack() as stack:
        opened = [stack.enter_context(cpu_session(model)) for model in models]
        session: TwoStepChain | TwoStepSession
        if build.layout == "segments":
            session = TwoStepChain(build, models, opened, reuse)
        else:
            session = TwoStepSession(models[0], models[1], opened)
        return validate_session(
            case.arithmetic,
            plain,
            session,
            reference,
            limit=case.limit,
            shapes=shapes,
            seed=seed,
        )
