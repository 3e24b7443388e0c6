"""A compiled cached run against the torch cached run of the same plan: two steps, the second uses the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from torch import Tensor, nn

from diffc.backends.ort import OrtSession
from diffc.cache.plan import Steps
from diffc.cache.resolve import ResolvedPlan
from diffc.cache.torch_apply import apply
from diffc.cache.variants import CacheBuild
from diffc.validate.fidelity import Reference, validate_session, validation_shapes
from diffc.validate.reports import SMOOTH, ShapeReport
from diffc.validate.tolerances import SMOOTH_REL_L2, tolerance_of
from diffc.validate.twin import cpu_session, feed, float32_twin, runs_on_cpu, smooth_twin
from passes.storage import load

Arrays = Mapping[str, npt.NDArray[Any]]
_EARLIER = 1.25
"""Time of the first step, in times of the second."""


class TwoSteps(nn.Module):
    """A backbone that is given the second of two steps, makes up the first, and uses the groups `reuse` of it."""

    def __init__(self, backbone: nn.Module, plan: ResolvedPlan, reuse: Sequence[int]):
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
    """The same with compiled models: the one that runs all, then the one that uses what it kept."""

    def __init__(self, full: onnx.ModelProto, reduced: onnx.ModelProto, opened: Sequence[OrtSession]):
        self._models, self._sessions = (full, reduced), opened

    def run(self, given: Arrays) -> dict[str, npt.NDArray[Any]]:
        """The backbone's output of the second step."""
        kept = self._sessions[0].run(feed(self._models[0], first_step(given)))
        found = self._sessions[1].run(feed(self._models[1], {**given, **kept}))
        return {name: array for name, array in found.items() if not name.startswith("cached_")}


def first_step(given: Mapping[str, Any]) -> dict[str, Any]:
    """Other latents at an earlier time, the rest as given; exact in every type."""
    earlier = dict(given)
    name = "sample" if "sample" in given else "hidden_states"
    latents = given[name]
    earlier[name] = -latents.flip(-1) if isinstance(latents, Tensor) else -np.flip(latents, -1)
    earlier["timestep"] = given["timestep"] * np.float32(_EARLIER)
    return earlier


@dataclass(frozen=True)
class _Case:
    arithmetic: str
    models: tuple[onnx.ModelProto, onnx.ModelProto]
    limit: float


def validate_cached(
    folder: Path, build: CacheBuild, reference: Reference, *, format: str, seed: int
) -> list[ShapeReport]:
    """Every reduced model, after the full one, against torch; at the two shapes and within the limits of a compile.

    The variants' files are in `folder`. The reports are called after the reduced model's file.
    """
    reports: list[ShapeReport] = []
    for variant in build.variants[1:]:
        stepping = Reference(
            reference.source,
            reference.dtype,
            None,
            model=TwoSteps(reference.model, build.plan, variant.reuse),
        )
        stepping.quantized = reference.quantized
        for target, file in variant.files.items():
            if any(report.model == file for report in reports):
                continue  # another target's, and the same
            models = load(folder / build.variants[0].files[target]), load(folder / file)
            for case in _cases(models, reference, format):
                found = _run(case, stepping, seed)
                reports += [replace(report, model=file) for report in found]
    return reports


def _cases(models: tuple[onnx.ModelProto, onnx.ModelProto], reference: Reference, format: str) -> list[_Case]:
    twins = tuple(float32_twin(m) if reference.dtype != "float32" else m for m in models)
    cases = [_Case("float32", (twins[0], twins[1]), tolerance_of(format, "float32"))]
    if reference.quantized:
        smooth = smooth_twin(models[0]), smooth_twin(models[1])
        cases.insert(0, _Case(SMOOTH, smooth, SMOOTH_REL_L2))
    if reference.dtype == "float16" and all(runs_on_cpu(m) for m in models):
        cases.append(_Case("float16", models, tolerance_of(format, "float16")))
    return cases


def _run(case: _Case, reference: Reference, seed: int) -> list[ShapeReport]:
    full, reduced = case.models
    with ExitStack() as stack:
        opened = [stack.enter_context(cpu_session(model)) for model in case.models]
        session = TwoStepSession(full, reduced, opened)
        return validate_session(
            case.arithmetic,
            full,  # its inputs are what a step is given; it also tells how attention is quantized
            session,
            reference,
            limit=case.limit,
            shapes=validation_shapes(reference.source),
            seed=seed,
        )
