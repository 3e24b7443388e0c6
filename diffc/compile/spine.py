"""The spine of a compile: one call per stage, in the order in which data flows.

This file and `plan.py` alone know what a Plan holds; each stage is given what it uses by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import onnx
import torch

from diffc.artifact.describe import described_engines
from diffc.artifact.folder import Artifact, file_names, staging, write_manifest
from diffc.artifact.records import save_passes
from diffc.artifact.resume import CHECKPOINT, calibration_work, mark_calibrated
from diffc.backends.target import DEFAULT_ENGINE
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
from diffc.compile.calibration import (
    PipelineRun,
    calibrate_on_prompts,
    calibrate_on_random_inputs,
    kept_checkpoint,
    load_checkpoint,
    uncalibrated,
)
from diffc.compile.engines import build_engines, engine_profile
from diffc.compile.experts import expert_requests
from diffc.compile.graphs import Graphs, canonicalize, legalize, write
from diffc.compile.held_checkpoint import held_checkpoint
from diffc.compile.live import LiveModel, is_model_object, read_live, rest_of_pipeline
from diffc.compile.lora_slots import slotted
from diffc.compile.manifest import described_checkpoint, manifest
from diffc.compile.onnx_model import compile_onnx
from diffc.compile.pipeline_step import check_step
from diffc.compile.plan import Plan, assumed, check, check_targets, describe
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest, CompileResult, request_key
from diffc.compile.shared import Calibrations
from diffc.compile.validation import validate_by_layer, validate_whole
from diffc.errors import UsageError
from diffc.frontend.trace import trace as trace_backbone
from diffc.frontend.trace import trace_seconds
from diffc.models.sources.backbone import FakeBackbone, check_weights, loading_seconds
from diffc.paths import AnyPath
from diffc.progress import Parts, Reporter, estimated
from diffc.progress_bar import default_reporter
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

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]


@overload
def compile_model(model: CompileRequest, output: Reporter | None = None) -> CompileResult: ...


@overload
def compile_model(
    model: Any, output: AnyPath, ui: Reporter | None = None, **settings: Any
) -> CompileResult: ...


def compile_model(
    model: Any, output: AnyPath | Reporter | None = None, ui: Reporter | None = None, **settings: Any
) -> CompileResult:
    """Compile a backbone: quantize, trace, rewrite, write, validate, build; the artifact appears when all is done.

    `model`: a CompileRequest, then with a Reporter at most. Otherwise what MODEL of the command line can be, or a
    diffusers pipeline or backbone in memory, with `output`, the folder to write, and `settings`, the other fields of
    CompileRequest. Of a model in memory the live weights are compiled: a LoRA that was fused into them counts, and
    quantizers of mtq.quantize are the calibration. A pipeline calibrates as it is, and is as before at the end.

    Raises DiffcError or PassError for what the user can fix, MismatchError when outputs differ.
    """
    if isinstance(model, CompileRequest):
        reporter: Any = ui or output or default_reporter()
        return _compile(model, reporter)
    if output is None or not isinstance(output, str | os.PathLike):
        raise UsageError(
            "compile_model is given a model and no folder to write", fix="compile_model(model, output)"
        )
    ui = ui or default_reporter()
    if not is_model_object(model):
        return _compile(CompileRequest(model, output, **settings), ui)
    with read_live(model, ui) as live:
        request = CompileRequest(live.source.name, output, **settings)
        if live.checkpoint is not None:
            request = of_calibration(request, live.checkpoint)
        return _compile(request, ui, live)


def of_calibration(request: CompileRequest, checkpoint: Checkpoint) -> CompileRequest:
    """The request with the format of a model that was quantized in memory. Raises UsageError for another one."""
    if request.format not in ("auto", "none", checkpoint.format):
        raise UsageError(
            f"the model was quantized to {checkpoint.format} by mtq.quantize, and {request.format} is asked for",
            fix="leave format out, or give the model before mtq.quantize",
        )
    if request.from_checkpoint is not None:
        raise UsageError(
            "the model was quantized by mtq.quantize, and has a calibration of its own",
            fix="leave from_checkpoint out, or give the model before mtq.quantize",
        )
    return replace(request, format=checkpoint.format)


@dataclass(frozen=True)
class Made:
    """What a compile has before it builds engines: the stages after it, for other GPUs too, take no more than this.

    `hashes` are those of the files that were written with the weights; `files` all files of the artifact by then.
    """

    plan: Plan
    checkpoint: Checkpoint | None
    noise: CacheNoise | None
    graphs: Graphs
    validation: Sequence[ShapeReport]
    hashes: Mapping[str, str]
    files: tuple[str, ...]


def _compile(request: CompileRequest, ui: Reporter, live: LiveModel | None = None) -> CompileResult:
    """The compile of a request, whose model may be in memory."""
    if request.model.endswith(".onnx"):
        return compile_onnx(request, ui)
    ui = Recorded(ui)
    plan = check(request) if live is None else check(request, live.source, live.checkpoint)
    return compile_plan(plan, ui)[1]


def compile_plan(
    plan: Plan, ui: Recorded, calibrations: Calibrations | None = None
) -> tuple[Made, CompileResult]:
    """The compile of a plan. `calibrations`: where an equal calibration is looked for, and a new one is kept."""
    backbone = FakeBackbone(plan.source, plan.dtype)
    check_weights(backbone)
    ui.note(describe(plan))
    for applied in plan.source.loras:
        ui.note(applied.summary())
    for line in (*assumed(plan), *filter(None, [unreached(plan, backbone)])):
        ui.note(line)
    parts = Parts(ui, part_names(plan))
    cache = resolve_cache(plan, backbone, ui)
    request = plan.request
    expert_requests(request, plan.source, request.output)  # what cannot be is refused before any work
    hold_interface(plan, ui)
    with staging(request.output, force=request.force, key=key_of(plan), note=ui.note) as folder:
        checkpoint = quantize(plan, backbone, folder, parts["quantize"], calibrations)
        noise = measure(plan, cache, checkpoint, parts["quantize"])
        traced = trace(plan, backbone, checkpoint, parts["trace"])
        graphs = rewrite(plan, backbone, traced, cache, parts["rewrite"])
        hashes = write(graphs, folder, parts["write"])
        validation = validate(plan, checkpoint, graphs, folder, parts["validate"])
        made = Made(plan, checkpoint, noise, graphs, validation, hashes, file_names(folder))
        written, engines = finish(plan, made, folder, ui)
    return made, result_of(plan, made, written, engines)


def key_of(plan: Plan) -> str:
    """What a compile that goes on with another one must have in common with it (`request_key`)."""
    loras = [applied.file.path for applied in plan.source.loras]
    files = [plan.source.pipeline_dir or plan.source.path, *plan.request.cache_files, *loras]
    return request_key(plan.request, files, identity_of(plan))


def finish(
    plan: Plan, made: Made, folder: Path, ui: Recorded
) -> tuple[dict[str, Any], Sequence[EngineReport]]:
    """Build the engines of `plan` beside the files of `made` in `folder`, and write the manifest, which is returned."""
    graphs, validation = made.graphs, made.validation
    engines = build(plan, graphs, folder, Parts(ui, part_names(plan))["build"])
    explain(plan, graphs, validation, engines, folder)
    experts = compile_experts(plan, folder, ui)
    content = {**manifest(plan, graphs, validation, engines, made.noise), **experts}
    content |= described_checkpoint(made.checkpoint)
    save_passes(graphs.records, folder)
    ui.save(folder, engines)
    return write_manifest(folder, content, made.hashes), engines


def result_of(
    plan: Plan, made: Made, written: dict[str, Any], engines: Sequence[EngineReport]
) -> CompileResult:
    """What a compile returns, its engines where they are now."""
    output = plan.request.output
    moved = [engine.moved(output / "engines") for engine in engines]
    return CompileResult(Artifact(output, written), made.graphs.records, made.validation, moved)


def compile_experts(plan: Plan, folder: Path, ui: Reporter) -> dict[str, Any]:
    """Compile the other experts of the pipeline into `folder`; the entry of the manifest that names them."""
    wanted = expert_requests(plan.request, plan.source, folder)
    for name, request in wanted.items():
        ui.note(f"{name}: the pipeline's backbone for other times")
        _compile(request, ui)
    return {"experts": list(wanted)} if wanted else {}


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


def identity_of(plan: Plan) -> str:
    """What stands for the model in the key of a compile: its weights, and all else of a model in memory that counts."""
    source, checkpoint = plan.source, plan.checkpoint
    calibration = "" if checkpoint is None else checkpoint.digest
    return " ".join(filter(None, (source.fingerprint, calibration, rest_of_pipeline(source))))


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


def part_names(plan: Plan) -> tuple[str, ...]:
    """The parts that this compile has, in order."""
    parts = {
        "quantize": plan.format.quantizes,
        "trace": True,
        "rewrite": True,
        "write": True,
        "validate": not plan.request.skip_validation,
        "build": any(target.is_engine for target in plan.targets),
    }
    return tuple(name for name, there in parts.items() if there)


def resolve_cache(plan: Plan, backbone: FakeBackbone, ui: Reporter) -> ResolvedCache | None:
    """The cache plan on this backbone; None where none is asked for. Raises DiffcError when it does not fit."""
    find_layout(plan.request.cache_layout)
    if not plan.request.cache_plan:
        return None
    cache = resolve_for(backbone, plan.request.cache_plan)
    for line in describe_cache(cache):
        ui.note(line)
    return cache


def quantize(
    plan: Plan,
    backbone: FakeBackbone,
    folder: Path,
    ui: Reporter,
    calibrations: Calibrations | None = None,
) -> Checkpoint | None:
    """The calibrated checkpoint, saved in `folder`/checkpoint, in `calibrations`, and where --save-checkpoint says.

    None for a format that does not quantize.
    """
    if plan.format is STORED:
        checkpoint = held_checkpoint(plan.source, backbone)
        if checkpoint is not None:
            checkpoint.save(folder / CHECKPOINT)
        return checkpoint
    if not plan.format.quantizes:
        return None
    checkpoint = kept_checkpoint(folder)
    shared = calibrations if plan.calibrates else None
    key = "" if shared is None else calibration_key(plan)
    if checkpoint is not None:
        ui.note("calibration is taken over from a compile that was stopped")
    elif shared is not None and shared.lend(key, folder / CHECKPOINT):
        checkpoint = Checkpoint.load(folder / CHECKPOINT)
        ui.note("calibration is taken from an equal one of another compile")
    else:
        checkpoint = calibrated(plan, backbone, ui, calibration_work(folder))
        checkpoint.save(folder / CHECKPOINT)
        if checkpoint.weights:
            # From here on the weights are those of the copy, so that the artifact depends on no other file, and a
            # compile that is taken up finds the journal of the same sources.
            checkpoint = Checkpoint.load(folder / CHECKPOINT)
        if plan.calibrates:
            mark_calibrated(folder)
    if shared is not None:
        shared.keep(key, folder / CHECKPOINT)
    if checkpoint.weights:
        count, all_weights = len(checkpoint.weights), len(plan.source.weights)
        ui.note(
            f"{count} of {all_weights} weights are those of the checkpoint, not those of {plan.source.name}"
        )
    if plan.request.save_checkpoint is not None:
        checkpoint.save(plan.request.save_checkpoint)
        ui.note(f"the calibration is saved in {plan.request.save_checkpoint}")
    return checkpoint


def calibration_key(plan: Plan) -> str:
    """What two compiles must have in common for their calibrations to be equal: a hash."""
    same = replace(
        plan.request,
        targets=("ort",),
        sms=(),
        dtype=plan.dtype
        if torch.cuda.is_available()
        else "float32",  # on the CPU the pipeline runs in float32
        profile="",
        lora_slots=0,
        cache_plan="",
        cache_layout="",
        passes="",
        engine=DEFAULT_ENGINE,
        skip_validation=False,
    )
    return key_of(replace(plan, request=same))


def calibrated(plan: Plan, backbone: FakeBackbone, ui: Reporter, work: Path | None = None) -> Checkpoint:
    """The checkpoint that the request names, or a new one, whose calibration keeps in `work` how far it is."""
    request = plan.request
    if plan.checkpoint is not None:
        return plan.checkpoint
    if request.from_checkpoint is not None:
        return load_checkpoint(request.from_checkpoint, plan.format, backbone)
    if plan.format.algorithm is None:
        return uncalibrated(plan.format, request.options, backbone)
    if request.calibrate == "synthetic":
        return calibrate_on_random_inputs(
            plan.source,
            plan.format,
            request.options,
            ui,
            batch_size=request.batch_size,
            size=request.image_size,
            seed=request.seed,
        )
    run = pipeline_run(plan)
    if plan.sampling.why:
        ui.note(str(plan.sampling))
    return calibrate_on_prompts(
        plan.source, plan.format, request.options, run, ui, count=request.calib_size, work=work
    )


def pipeline_run(plan: Plan) -> PipelineRun:
    """How the request wants the pipeline to be run."""
    r, sampling = plan.request, plan.sampling
    return PipelineRun(
        r.prompts,
        sampling.steps,
        r.batch_size,
        r.height or r.image_size,
        r.width or r.image_size,
        r.seed,
        plan.dtype,
        r.component_dtypes,
        sampling.guidance,
        r.negative_prompt,
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
