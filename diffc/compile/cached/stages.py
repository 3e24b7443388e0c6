"""The part of a compile that a cache plan adds: more models over the same weights, their checks and engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from diffc.cache.presets import plan_of
from diffc.cache.resolve import ResolvedPlan, resolve, spell
from diffc.compile.cached.variants import LAYOUTS, CacheBuild, Layout, Variant, check_variants, split
from diffc.compile.plan import CompileRequest, Plan
from diffc.errors import unknown
from diffc.models.sources.locate import ModelSource
from diffc.progress import Reporter
from passes.graph.check import Check, check_structure
from passes.storage import weight_bytes

if TYPE_CHECKING:
    from diffc.backends.tensorrt.build import EngineReport
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.validate.reports import ShapeReport


def resolve_plan(plan: Plan, ui: Reporter) -> ResolvedPlan | None:
    """The cache plan of a compile on its backbone, made without weights; None where none is asked for.

    Raises DiffcError when the plan cannot be read, or does not fit.
    """
    request = plan.request
    layout_of(request)
    if not request.cache_plan:
        return None
    found = resolve_for(plan.source, request.cache_plan)
    for group in found.groups:
        ui.note(f"cache plan: the {group.keep} of {spell(group.blocks)} is used again")
    for note in found.notes:
        ui.note(f"cache plan: {note}")
    return found


def resolve_for(source: ModelSource, text: str) -> ResolvedPlan:
    """A preset or plan file on the backbone of `source`, of which no weight is read."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffc.models.sources.backbone import build_backbone

    with FakeTensorMode():
        backbone = build_backbone(source.family, source.config, torch.float32)
    return resolve(plan_of(text, backbone), backbone)


def plan_files(request: CompileRequest) -> list[Path]:
    """The file of the cache plan, where it is one: what the result depends on."""
    return [Path(request.cache_plan)] if request.cache_plan.endswith((".json", ".yaml", ".yml")) else []


def layout_of(request: CompileRequest) -> Layout:
    """The layout that is asked for. Raises DiffcError that lists those there are."""
    for layout in LAYOUTS:
        if layout == request.cache_layout:
            return layout
    raise unknown("cache layout", request.cache_layout, LAYOUTS)


def build_variants(plan: Plan, cache: ResolvedPlan, canonical: onnx.ModelProto, ui: Reporter) -> CacheBuild:
    """The variants of the canonical graph, checked against each other, in every target's form."""
    from diffc.validate.passes import NUMERIC_LIMIT, NumericCheck
    from diffc.validate.torch_reference import validation_arrays

    build = split(canonical, cache, plan.source, layout_of(plan.request))
    if not build.variants:
        ui.note("cache plan: no step uses anything again")
        return build
    if weight_bytes(canonical) > NUMERIC_LIMIT:
        ui.note("the graphs of the cache plan are checked in structure only, as the passes are")
        checks: list[Check] = [check_structure for _ in build.variants]
    else:
        with ui.stage("check the graphs of the cache plan"):
            drawn = validation_arrays(plan.source, plan.dtype, plan.request.seed, plan.profile.batch)
            arrays = check_variants(build, drawn)
        checks = [NumericCheck(partial(_fed, v, arrays)) for v in build.variants]
    if build.layout == "segments":
        ui.note(f"cache plan: a chain of {len(build.variants)} segments")
    pairs = zip(build.variants, checks, strict=True)
    return replace(build, variants=tuple(_legalized(plan, v, check, ui) for v, check in pairs))


def _fed(variant: Variant, arrays: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The inputs that a variant takes, of arrays that hold more."""
    names = [value.name for value in variant.model.graph.input]
    return [{name: values[name] for name in names} for values in arrays]


def _legalized(plan: Plan, variant: Variant, check: Check, ui: Reporter) -> Variant:
    from diffc.compile.spine import legal_options, legalize

    dump = plan.request.dump
    graphs = legalize(
        variant.model,
        plan.targets,
        check,
        None if dump is None else dump / variant.suffix.strip("-"),
        ui,
        {**legal_options(plan), "across_blocks": False},
    )
    names = {name: f"{Path(name).stem}{variant.suffix}.onnx" for name in graphs.models}
    models = {names[name]: model for name, model in graphs.models.items()}
    return replace(variant, legalized=models, files={t: names[name] for t, name in graphs.files.items()})


def validate_variants(
    plan: Plan, checkpoint: Checkpoint | None, build: CacheBuild, folder: Path, ui: Reporter
) -> list[ShapeReport]:
    """Compiled cached steps against torch cached steps; nothing for a model too large to be validated whole."""
    if not build.variants:
        return []
    if plan.streams_validation:
        ui.note("the cached steps are not validated: the model is too large to run it whole")
        return []
    from diffc.compile.cached.validate import validate_cached
    from diffc.validate.torch_reference import TorchReference

    with ui.stage("validate cached steps against torch"):
        reference = TorchReference(plan.source, plan.dtype, checkpoint)
        return validate_cached(folder, build, reference, format=plan.format.name, seed=plan.request.seed + 1)


def build_cached_engines(plan: Plan, build: CacheBuild, folder: Path, ui: Reporter) -> list[EngineReport]:
    """Engines of every variant, for every target and compute capability."""
    from diffc.compile.spine import Graphs, build_engines

    engines: list[EngineReport] = []
    for variant in build.variants:
        profile = build.profile(variant, plan.spec, plan.source.config, plan.profile)
        graphs = Graphs(variant.legalized, variant.files, ())
        engines += build_engines(
            *(plan.targets, plan.request.sms, graphs, folder, (profile,), ui),
            suffix=variant.suffix,
            options=plan.request.engine,
        )
    return engines
