"""The spine: one call per stage, in the order in which data flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.folder import Artifact, staging, write_manifest
from diffc.artifact.resume import journal, kept_checkpoint, request_key
from diffc.backends.target import DEFAULT_ENGINE, EngineOptions, Profile, Target
from diffc.compile.manifest import manifest
from diffc.compile.plan import CompileRequest, Plan, check, check_targets, describe
from diffc.progress import Reporter, Silent

if TYPE_CHECKING:
    import onnx

    from diffc.backends.tensorrt.build import EngineReport
    from diffc.cache.resolve import ResolvedPlan
    from diffc.compile.cached.noise import CacheNoise
    from diffc.compile.cached.variants import CacheBuild
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.validate.reports import ShapeReport
    from diffc.validate.torch_reference import TorchReference
    from passes.graph.check import Check
    from passes.pipeline import PassRecord

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]


@dataclass(frozen=True)
class CompileResult:
    """The artifact, and what each stage reports beyond the manifest."""

    artifact: Artifact
    passes: Sequence[PassRecord]
    validation: Sequence[ShapeReport]
    engines: Sequence[EngineReport] = field(default=())


def compile_model(request: CompileRequest, ui: Reporter | None = None) -> CompileResult:
    """Compile a backbone: quantize, trace, rewrite, write, validate, build; the artifact appears when all is done.

    Raises DiffcError or PassError for what the user can fix, MismatchError when outputs differ.
    """
    ui = ui or Silent()
    if request.model.endswith(".onnx"):
        from diffc.compile.onnx_model import compile_onnx

        return compile_onnx(request, ui)
    plan = check(request)
    ui.note(describe(plan))
    cache = _cache_plan(plan, ui)
    files = [plan.source.pipeline_dir or plan.source.path, *_cache_files(request)]
    key = request_key(request, files, plan.source.fingerprint)
    with staging(request.output, force=request.force, key=key) as folder:
        checkpoint = quantize(plan, folder, ui)
        noise = _cache_noise(plan, cache, checkpoint, ui)
        traced = trace(plan, checkpoint, ui)
        graphs = rewrite(plan, traced, ui, cache)
        hashes = write(graphs, folder, ui)
        validation = validate(plan, checkpoint, graphs, folder, ui)
        engines = build(plan, graphs, folder, ui)
        content = manifest(plan, graphs, validation, engines, noise)
        written = write_manifest(folder, content, hashes)
    artifact = Artifact(request.output, written)
    return CompileResult(
        artifact, graphs.records, validation, [e.moved(request.output / "engines") for e in engines]
    )


def quantize(plan: Plan, folder: Path, ui: Reporter) -> Checkpoint | None:
    """A calibrated checkpoint in `folder`/checkpoint: a given one, or a new one from the pipeline on prompts."""
    if not plan.format.quantizes:
        return None
    from diffc.compile.calibration import calibrated, given

    if (kept := kept_checkpoint(folder)) is not None:
        ui.note("calibration is taken over from a compile that was stopped")
        return kept
    checkpoint = given(plan) if plan.request.from_checkpoint else calibrated(plan, ui)
    checkpoint.save(folder / "checkpoint")
    return checkpoint


def trace(plan: Plan, checkpoint: Checkpoint | None, ui: Reporter) -> onnx.ModelProto:
    """The backbone as an ONNX graph whose weights are recipes; no weight is read."""
    from diffc.frontend.trace import trace as run

    with ui.stage("trace on fake tensors"):
        return run(plan.source, dtype=plan.dtype, checkpoint=checkpoint)


@dataclass(frozen=True)
class Graphs:
    """The models to write, by file name, which of them each target takes, and what the passes did.

    `cache` holds the models that a cache plan adds.
    """

    models: Mapping[str, onnx.ModelProto]
    files: Mapping[str, str]
    records: Sequence[PassRecord]
    cache: CacheBuild | None = None


def _cache_plan(plan: Plan, ui: Reporter) -> ResolvedPlan | None:
    from diffc.compile.cached.stages import resolve_plan

    return resolve_plan(plan, ui)


def _cache_noise(
    plan: Plan, cache: ResolvedPlan | None, checkpoint: Checkpoint | None, ui: Reporter
) -> CacheNoise | None:
    if cache is None:
        return None
    from diffc.compile.cached.noise import measure_noise

    return measure_noise(plan, cache, checkpoint, ui)


def _cache_files(request: CompileRequest) -> Sequence[Path]:
    from diffc.compile.cached.stages import plan_files

    return plan_files(request)


def rewrite(plan: Plan, model: onnx.ModelProto, ui: Reporter, cache: ResolvedPlan | None = None) -> Graphs:
    """The canonical passes, then each target's own on what they made; every one checked in numbers.

    model.onnx is the first target's. Targets that want the same share it; one that wants another has its own, over
    the same file of weights.
    """
    from diffc.validate.passes import NumericCheck
    from diffc.validate.torch_reference import validation_arrays
    from passes import Pipeline
    from passes.canonical.fix_size import FixSize
    from passes.presets import CANONICAL

    batch = plan.profile.batch
    fixed = () if batch is None else (FixSize("batch", batch),)
    checker = NumericCheck(lambda: validation_arrays(plan.source, plan.dtype, plan.request.seed, batch))
    with ui.stage("rewrite the graph") as update:
        canonical = Pipeline((*fixed, *CANONICAL)).run(
            model, check=checker, dump=plan.request.dump, on_event=lambda e: update(e.index, e.total)
        )
    ui.note(f"{len(model.graph.node)} -> {len(canonical.model.graph.node)} nodes")
    graphs = legalize(canonical.model, plan.targets, checker, plan.request.dump, ui, legal_options(plan))
    graphs = replace(graphs, records=[*canonical.records, *graphs.records])
    if cache is None:
        return graphs
    from diffc.compile.cached.stages import build_variants

    return replace(graphs, cache=build_variants(plan, cache, canonical.model, ui))


def legal_options(plan: Plan) -> dict[str, Any]:
    """What the passes of a target are told about the model: whether its attention is quantized, and its usual size."""
    tokens = plan.spec.tokens(plan.source.config, plan.profile.optimum)
    return {"quantized_attention": plan.request.options.quantizes_attention, "tokens": tokens}


def legalize(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    check: Check,
    dump: Path | None,
    ui: Reporter,
    options: Mapping[str, Any] | None = None,
) -> Graphs:
    """Each target's own passes on the canonical `model`, with the options of `target_passes`."""
    from passes import Pipeline
    from passes.presets import target_passes

    records: list[PassRecord] = []
    wanted = {}
    for target in targets:
        steps = target_passes(target.name, **(options or {}))
        with ui.stage(f"legalize for {target.name}") as update:
            result = Pipeline(steps).run(
                model,
                check=check,
                dump=None if dump is None else dump / target.name,
                on_event=lambda e: update(e.index, e.total),
            )
        records += result.records
        wanted[target.name] = result.model
    return Graphs(*_share(wanted), records)


def _share(wanted: Mapping[str, onnx.ModelProto]) -> tuple[dict[str, onnx.ModelProto], dict[str, str]]:
    """File names for the distinct models, and which file each target takes."""
    known: dict[bytes, str] = {}
    models, files = {}, {}
    for target, model in wanted.items():
        text = model.SerializeToString(deterministic=True)
        if text not in known:
            known[text] = f"model-{target}.onnx" if known else "model.onnx"
            models[known[text]] = model
        files[target] = known[text]
    return models, files


def write(graphs: Graphs, folder: Path, ui: Reporter) -> dict[str, str]:
    """Compute the weights recipe by recipe and stream them to model.onnx_data; returns hashes by file name."""
    from passes.storage import save_all

    models = {folder / name: model for name, model in graphs.models.items()}
    for variant in graphs.cache.variants if graphs.cache else ():
        models |= {folder / name: model for name, model in variant.legalized.items()}
    with ui.stage("write weights") as update:
        files = save_all(models, lambda done, total, name: update(done, total), journal(folder))
    return {file.path.name: file.sha256 for file in files}


def validate(
    plan: Plan, checkpoint: Checkpoint | None, graphs: Graphs, folder: Path, ui: Reporter
) -> Sequence[ShapeReport]:
    """ONNX Runtime against ModelOpt's fake-quantized torch model at two shapes. Raises MismatchError.

    A model too large for that is run layer by layer on both sides, at one shape.
    """
    if plan.request.skip_validation:
        ui.note("not validated, as --skip-validation asks")
        return ()
    from diffc.validate.reports import require_match, save_reports

    run = _streamed if plan.streams_validation else _whole
    reports = run(plan, checkpoint, {name: folder / name for name in graphs.models}, ui)
    if graphs.cache is not None:
        from diffc.compile.cached.stages import validate_variants

        reports += validate_variants(plan, checkpoint, graphs.cache, folder, ui)
    save_reports(reports, folder / "validation")
    require_match(reports)
    return reports


def _whole(
    plan: Plan, checkpoint: Checkpoint | None, models: Mapping[str, Path], ui: Reporter
) -> list[ShapeReport]:
    from diffc.validate.outputs import validate_model
    from diffc.validate.torch_reference import TorchReference, validation_shapes
    from passes.storage import load

    reports = []
    reference = TorchReference(plan.source, plan.dtype, checkpoint)
    shapes = validation_shapes(plan.source, plan.profile.batch)
    for name, path in models.items():
        with ui.stage(f"validate {name} against torch") as update:
            found = validate_model(
                load(path),
                reference,
                format=plan.format.name,
                shapes=shapes,
                seed=plan.request.seed + 1,
                update=update,
            )
        reports += [replace(report, model=name) for report in found]
        if chaotic := next((report for report in found if report.chaotic), None):
            _examine(name, load(path), reference, chaotic, plan.format.name, ui)
    return reports


def _examine(
    name: str,
    model: onnx.ModelProto,
    reference: TorchReference,
    chaotic: ShapeReport,
    format: str,
    ui: Reporter,
) -> None:
    """Every module by itself, where roundings hide what the outputs would say. Raises MismatchError."""
    from diffc.validate.modules import compare_modules, require_right_modules
    from diffc.validate.reports import NOT_WRITTEN

    with ui.stage(f"examine {name} module by module: its outputs are at the mercy of roundings") as update:
        found = compare_modules(
            model, reference, format=format, shape=chaotic.shape, seed=chaotic.seed, update=update
        )
    require_right_modules(found, name, against="torch", fix=NOT_WRITTEN)


def _streamed(
    plan: Plan, checkpoint: Checkpoint | None, models: Mapping[str, Path], ui: Reporter
) -> list[ShapeReport]:
    from diffc.validate.streamed import StreamedReference, validate_streamed
    from passes.storage import load

    ui.note("too large to be validated at once in the memory that is free: layer by layer, at one shape")
    reports = []
    reference = StreamedReference(plan.source, plan.dtype, checkpoint)
    for name, path in models.items():
        with ui.stage(f"validate {name} against torch, layer by layer"):
            found = validate_streamed(
                load(path), reference, format=plan.format.name, seed=plan.request.seed + 1
            )
        reports += [replace(report, model=name) for report in found]
    return reports


def build(plan: Plan, graphs: Graphs, folder: Path, ui: Reporter) -> Sequence[EngineReport]:
    """One engine per target and compute capability, in `folder`/engines; with a cache plan, of each of its models."""
    if graphs.cache is not None and graphs.cache.variants:
        from diffc.compile.cached.stages import build_cached_engines

        return build_cached_engines(plan, graphs.cache, folder, ui)
    profiles = (engine_profile(plan),)
    return build_engines(
        plan.targets, plan.request.sms, graphs, folder, profiles, ui, options=plan.request.engine
    )


def build_engines(
    targets: Sequence[Target],
    sms: Sequence[int],
    graphs: Graphs,
    folder: Path,
    profiles: tuple[Profile, ...],
    ui: Reporter,
    *,
    suffix: str = "",
    options: EngineOptions = DEFAULT_ENGINE,
) -> Sequence[EngineReport]:
    """One engine per target and compute capability, from the file that the target takes; `suffix` ends its name."""
    from diffc.backends.tensorrt.build import EngineRequest, build_engine
    from diffc.backends.tensorrt.epcontext import write_context

    engines = []
    for target in (t for t in targets if t.is_engine):
        (folder / "engines").mkdir(exist_ok=True)
        for group in [(sm,) for sm in sms] if target.ahead_of_time else [()]:
            name = target.name + "".join(f"-sm{sm}" for sm in group) + suffix
            output = folder / "engines" / f"{name}.engine"
            model_file = folder / graphs.files[target.name]
            request = EngineRequest(target.name, model_file, output, group, profiles, options)
            with ui.stage(f"build {name}") as update:
                report = build_engine(request, on_progress=lambda _, done, total: update(done, total))
            engines.append(report)
            for sm in group if report.weights is None else ():  # an EPContext node has no weights to give
                model = graphs.models[graphs.files[target.name]]
                write_context(model, output, version=report.version, sm=sm)
            ui.note(_built(report))
    return engines


def _built(report: EngineReport) -> str:
    """What the user reads of an engine: its size, and what the builder took."""
    memory = "" if report.peak_rss is None else f", builder's peak {report.peak_rss / 1e9:.1f} GB"
    return f"{report.nbytes / 1e6:.1f} MB, {report.layers} layers{memory}"


def engine_profile(plan: Plan) -> Profile:
    """The shape profile as input shapes of the graph."""
    shapes = (plan.profile.minimum, plan.profile.optimum, plan.profile.maximum)
    return Profile.of(*(plan.spec.input_shapes(plan.source.config, shape) for shape in shapes))
