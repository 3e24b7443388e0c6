"""The stages that a cache plan adds to a compile: resolve it, cut and check its models, build their engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from diffc.backends.target import EngineOptions, Target
from diffc.backends.tensorrt.build import EngineReport
from diffc.cache.layout import LAYOUTS, Layout
from diffc.cache.presets import plan_of
from diffc.cache.resolve import ResolvedCache, resolve, spell
from diffc.compile.cached.split import split
from diffc.compile.cached.variants import CacheBuild, Variant, check_variants
from diffc.compile.engines import build_engines, engine_profile
from diffc.compile.graphs import Graphs, legalize
from diffc.errors import unknown_value
from diffc.models.profiles import ShapeProfile
from diffc.models.sources.backbone import FakeBackbone
from diffc.models.sources.locate import ModelSource
from diffc.progress import Reporter
from diffc.validate.float32 import Arrays
from diffc.validate.passes import NUMERIC_LIMIT, NumericCheck
from passes.graph.check import Check, check_structure
from passes.presets import TargetOptions
from passes.storage import weight_bytes


def resolve_for(backbone: FakeBackbone, text: str) -> ResolvedCache:
    """A preset or plan file, `text`, on a backbone. Raises DiffcError when it cannot be read, or does not fit."""
    return resolve(plan_of(text, backbone.module), backbone.module)


def describe_cache(cache: ResolvedCache) -> list[str]:
    """What a user should know of a resolved plan, a line each."""
    lines = [f"the {group.keep} of {spell(group.blocks)} is used again" for group in cache.groups]
    return [f"cache plan: {line}" for line in (*lines, *cache.notes)]


def find_layout(name: str) -> Layout:
    """The cache layout of that name. Raises DiffcError that lists the known ones."""
    for layout in LAYOUTS:
        if layout == name:
            return layout
    raise unknown_value("cache layout", name, LAYOUTS)


def build_variants(
    canonical: onnx.ModelProto,
    cache: ResolvedCache,
    layout: Layout,
    backbone: FakeBackbone,
    targets: Sequence[Target],
    options: TargetOptions,
    inputs: Callable[[], Sequence[Arrays]],
    dump: Path | None,
    ui: Reporter,
) -> CacheBuild:
    """The models of the plan, cut out of the canonical graph, checked against each other, as each target takes them.

    `inputs`: values for the inputs of the canonical graph, which all checks use.
    """
    build = split(canonical, cache, backbone, layout)
    if not build.variants:
        ui.note("cache plan: no step uses anything again")
        return build
    checks = _checks(build, weight_bytes(canonical) > NUMERIC_LIMIT, inputs, ui)
    if layout == "segments":
        ui.note(f"cache plan: a chain of {len(build.variants)} segments")
    options = replace(options, across_blocks=False)
    pairs = zip(build.variants, checks, strict=True)
    return replace(
        build, variants=tuple(_legalized(v, targets, check, dump, ui, options) for v, check in pairs)
    )


def _checks(
    build: CacheBuild, large: bool, inputs: Callable[[], Sequence[Arrays]], ui: Reporter
) -> list[Check]:
    """The check of each variant's passes, after a check of the variants themselves where they are not too large."""
    if large:
        ui.note("the graphs of the cache plan are checked in structure only, as the passes are")
        return [check_structure for _ in build.variants]
    with ui.stage("check the graphs of the cache plan"):
        arrays = check_variants(build, inputs())
    return [NumericCheck(partial(_inputs_of, variant, arrays)) for variant in build.variants]


def _inputs_of(variant: Variant, arrays: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The inputs that a variant takes, of arrays that hold more."""
    names = [value.name for value in variant.model.graph.input]
    return [{name: values[name] for name in names} for values in arrays]


def _legalized(
    variant: Variant,
    targets: Sequence[Target],
    check: Check,
    dump: Path | None,
    ui: Reporter,
    options: TargetOptions,
) -> Variant:
    place = None if dump is None else dump / variant.suffix.strip("-")
    graphs = legalize(variant.model, targets, check, place, ui, options)
    names = {name: f"{Path(name).stem}{variant.suffix}.onnx" for name in graphs.models}
    models = {names[name]: model for name, model in graphs.models.items()}
    return replace(variant, legalized=models, files={t: names[name] for t, name in graphs.files.items()})


def build_cached_engines(
    build: CacheBuild,
    targets: Sequence[Target],
    sms: Sequence[int],
    options: EngineOptions,
    source: ModelSource,
    shapes: ShapeProfile,
    folder: Path,
    ui: Reporter,
) -> list[EngineReport]:
    """Engines of every variant, for every target and compute capability."""
    engines: list[EngineReport] = []
    dims = source.family.input_dims(source.config)
    for variant in build.variants:
        sizes = {**dims, **build.dims}
        profile = engine_profile(
            {value.name: sizes[value.name] for value in variant.model.graph.input}, source.family, shapes
        )
        graphs = Graphs(variant.legalized, variant.files, ())
        engines += build_engines(graphs, targets, sms, options, (profile,), folder, ui, suffix=variant.suffix)
    return engines
