"""The stages of a compile after its calibration, each a function of the plan and of what it uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from diffc.artifact.describe import described_engines
from diffc.backends.tensorrt.build import EngineReport
from diffc.cache.resolve import ResolvedCache
from diffc.compile.cached.noise import CacheNoise, measure_noise
from diffc.compile.cached.stages import (
    build_cached_engines,
    build_variants,
    describe_cache,
    find_layout,
    resolve_for,
)
from diffc.compile.cached.validate import validate_cached
from diffc.compile.engines import build_engines, engine_profile
from diffc.compile.graphs import Graphs, canonicalize, legalize
from diffc.compile.lora_slots import slotted
from diffc.compile.pipeline_step import check_step
from diffc.compile.plan import Plan
from diffc.compile.quantize import pipeline_run
from diffc.compile.validation import validate_by_layer, validate_whole
from diffc.frontend.trace import trace as trace_backbone
from diffc.frontend.trace import trace_seconds
from diffc.models.sources.backbone import FakeBackbone, loading_seconds
from diffc.progress import Reporter, estimated
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.convert import hidden_matrices
from diffc.quantize.formats import STORED
from diffc.validate.comparisons import format_of_graph
from diffc.validate.passes import NumericCheck
from diffc.validate.repeat import write_repetition
from diffc.validate.reports import ShapeReport, require_match, save_reports
from diffc.validate.streamed import StreamedReference
from diffc.validate.torch_reference import TorchReference, validation_arrays
from passes.presets import TargetOptions


def resolve_cache(plan: Plan, backbone: FakeBackbone, ui: Reporter) -> ResolvedCache | None:
    """The cache plan on this backbone; None where none is asked for. Raises DiffcError when it does not fit."""
    find_layout(plan.request.cache_layout)
    if not plan.request.cache_plan:
        return None
    cache = resolve_for(backbone, plan.request.cache_plan)
    for line in describe_cache(cache):
        ui.note(line)
    return cache


def hold_interface(plan: Plan, ui: Reporter) -> None:
    """Hold the graph's inputs against one step of the pipeline, where no calibration runs it anyway.

    Raises UnsupportedError where they differ.
    """
    if plan.request.skip_validation or not plan.source.has_pipeline or plan.runs_pipeline:
        return
    if plan.source.family.interface is not None:
        return  # it was read off the pipeline's own calls
    with ui.stage("one step of the pipeline, to see what it gives the backbone"):
        reason = check_step(plan.source)
    if reason:
        ui.note(f"the graph's inputs are not held against the pipeline: {reason}")


def unreached(plan: Plan, backbone: FakeBackbone) -> str:
    """Which weights no quantizer reaches, since they are in no layer; empty where there are none."""
    hidden = hidden_matrices(backbone.module) if plan.format.quantizes else {}
    if not hidden:
        return ""
    share = 100 * sum(hidden.values()) / max(1, plan.source.parameters)
    names = ", ".join([*list(hidden)[:3], *(["..."] if len(hidden) > 3 else [])])
    return (
        f"{share:.0f} % of the weights stay in {plan.dtype}: {len(hidden)} matrices are in no layer that can be"
        f" quantized ({names})"
    )


def measure(
    plan: Plan, cache: ResolvedCache | None, checkpoint: Checkpoint | None, ui: Reporter
) -> CacheNoise | None:
    """The rounding noise of what a cache plan keeps; None where nothing is kept, or no activation is rounded."""
    if cache is None or checkpoint is None or not plan.rounds_activations or not cache.reuse_sets():
        return None
    if plan.no_measurement:
        ui.note(f"cache plan: rounding noise of what is kept is not measured, {plan.no_measurement}")
        return None
    return measure_noise(plan.source, plan.dtype, cache, checkpoint, pipeline_run(plan), ui)


def trace(plan: Plan, backbone: FakeBackbone, checkpoint: Checkpoint | None, ui: Reporter) -> onnx.ModelProto:
    """The backbone as an ONNX graph whose weights are recipes; no weight is read."""
    with ui.stage("trace on fake tensors") as update, estimated(update, trace_seconds(plan.source)):
        return trace_backbone(plan.source, dtype=plan.dtype, checkpoint=checkpoint, backbone=backbone)


def rewrite(
    plan: Plan, backbone: FakeBackbone, model: onnx.ModelProto, cache: ResolvedCache | None, ui: Reporter
) -> Graphs:
    """The canonical passes, then each target's own on what they made; every one checked in numbers."""
    request, batch = plan.request, plan.profile.batch
    inputs = partial(validation_arrays, plan.source, plan.dtype, request.seed, batch)
    numbers = NumericCheck(inputs)
    keep = plan.format is STORED
    result = canonicalize(model, batch, request.own_passes, numbers, request.dump, ui, keep_codes=keep)
    graphs = legalize(result.model, plan.targets, numbers, request.dump, ui, target_options(plan))
    lora = slotted(graphs.models, graphs.files, request.lora_slots)
    graphs = replace(graphs, records=[*result.records, *graphs.records], lora=lora)
    if cache is None:
        return graphs
    layout, options = find_layout(request.cache_layout), target_options(plan)
    model = result.model
    variants = build_variants(model, cache, layout, backbone, plan.targets, options, inputs, request.dump, ui)
    return replace(graphs, cache=variants)


def target_options(plan: Plan) -> TargetOptions:
    """What the passes of a target are told about the model."""
    tokens = plan.source.family.tokens(plan.source.config, plan.profile.optimum)
    return TargetOptions(quantized_attention=plan.request.options.quantizes_attention, tokens=tokens)


def rounding_of(plan: Plan, graphs: Graphs) -> str:
    """The format that names the tolerance: of a file's own codes, one that rounds activations as the graph does."""
    return format_of_graph(graphs.models["model.onnx"]) if plan.format is STORED else plan.format.name


def validate(
    plan: Plan, checkpoint: Checkpoint | None, graphs: Graphs, folder: Path, ui: Reporter
) -> Sequence[ShapeReport]:
    """ONNX Runtime against ModelOpt's fake-quantized torch model. Raises MismatchError."""
    if plan.request.skip_validation:
        ui.note("not validated, as --skip-validation asks")
        return ()
    models = {name: folder / name for name in graphs.models}
    name, seed, shapes = rounding_of(plan, graphs), plan.request.seed + 1, plan.validation_shapes
    variants = graphs.cache is not None and graphs.cache.variants
    if plan.streams_validation:
        with ui.stage("load the torch model, its weights left in their files"):
            streamed = StreamedReference(plan.source, plan.dtype, checkpoint)
        reports = validate_by_layer(models, streamed, format=name, shape=shapes[0], seed=seed, ui=ui)
        if variants:
            ui.note("the cached steps are not validated: the model is too large to run it whole")
    else:
        with ui.stage("load the torch model") as update, estimated(update, loading_seconds(plan.source)):
            reference = TorchReference(plan.source, plan.dtype, checkpoint)
        reports = validate_whole(models, reference, format=name, shapes=shapes, seed=seed, ui=ui)
        if graphs.cache is not None and variants:
            reports += validate_cached(
                folder, graphs.cache, reference, format=name, shapes=shapes, seed=seed, ui=ui
            )
    save_reports(reports, folder / "validation")
    require_match(reports)
    return reports


def explain(
    plan: Plan, graphs: Graphs, reports: Sequence[ShapeReport], engines: Sequence[EngineReport], folder: Path
) -> None:
    """Beside the files of the validation, what repeats it with Polygraphy."""
    write_repetition(
        folder / "validation",
        graphs.models,
        graphs.files,
        reports,
        described_engines(engines),
        format=rounding_of(plan, graphs),
        dtype=plan.dtype,
    )


def build(plan: Plan, graphs: Graphs, folder: Path, ui: Reporter) -> Sequence[EngineReport]:
    """One engine per target and compute capability; with a cache plan, of each of its models."""
    request, source = plan.request, plan.source
    if graphs.cache is not None and graphs.cache.variants:
        return build_cached_engines(
            graphs.cache, plan.targets, request.sms, request.engine, source, plan.profile, folder, ui
        )
    profiles = (engine_profile(source.family.input_dims(source.config), source.family, plan.profile),)
    return build_engines(graphs, plan.targets, request.sms, request.engine, profiles, folder, ui)
