"""The spine: one call per stage, in the order in which data flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffc
from diffc.artifact import Artifact, check_output, staging, write_manifest
from diffc.backends.base import Profile, Target, check_format_sms, find_target
from diffc.errors import DiffcError, UnsupportedError, unknown
from diffc.models.locate import ModelSource, locate
from diffc.models.profiles import ShapeProfile, parse_profile
from diffc.models.spec import ModelSpec
from diffc.models.specs import find_spec
from diffc.quantize.formats import Format, find_format
from diffc.ui import Reporter, Silent

if TYPE_CHECKING:
    import onnx

    from diffc.backends.engine import EngineReport
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.validate.fidelity import ShapeReport
    from passes.pipeline import PassRecord

DTYPES = ("float32", "float16", "bfloat16")
VALIDATION_BYTES = 16
"""Memory per parameter while validating: torch's float32 weights, and ONNX Runtime's, each twice while loading."""
LIBRARIES = (
    "torch",
    "diffusers",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "onnx-graphsurgeon",
    "polygraphy",
)


@dataclass(frozen=True)
class CompileRequest:
    """Everything that a compile depends on; the defaults are those of the command line.

    `dtype` "auto" is the type in which the backbone's weights are stored. `profile` is the text of --profile.
    `image_size` (pixels) is that of the calibration images, None for the model's own.
    """

    model: str
    output: Path
    format: str = "none"
    targets: tuple[str, ...] = ("ort",)
    sms: tuple[int, ...] = ()
    dtype: str = "auto"
    profile: str = ""
    from_checkpoint: Path | None = None
    prompts: tuple[str, ...] | None = None
    steps: int = 20
    batch_size: int = 4
    image_size: int | None = None
    seed: int = 0
    skip_validation: bool = False
    force: bool = False
    dump: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A request whose every part was found and fits together."""

    request: CompileRequest
    source: ModelSource
    spec: ModelSpec
    format: Format
    targets: tuple[Target, ...]
    dtype: str
    profile: ShapeProfile


@dataclass(frozen=True)
class CompileResult:
    """The artifact, and what each stage reports beyond the manifest."""

    artifact: Artifact
    passes: Sequence[PassRecord]
    validation: Sequence[ShapeReport]
    engines: Sequence[EngineReport] = field(default=())


def compile_model(request: CompileRequest, ui: Reporter | None = None) -> CompileResult:
    """Compile a backbone: quantize, trace, rewrite, write, validate, build; the artifact appears when all is done.

    Raises DiffcError or PassError for what the user can mend, MismatchError when outputs differ.
    """
    ui = ui or Silent()
    plan = check(request)
    ui.note(describe(plan))
    with staging(request.output, force=request.force) as folder:
        checkpoint = quantize(plan, folder, ui)
        traced = trace(plan, checkpoint, ui)
        model, records = rewrite(plan, traced, ui)
        hashes = write(model, folder, ui)
        validation = validate(plan, checkpoint, folder, ui)
        engines = build(plan, folder, ui)
        content = manifest(plan, model, records, validation, engines)
        written = write_manifest(folder, content, hashes)
    return CompileResult(Artifact(request.output, written), records, validation, engines)


def check(request: CompileRequest) -> Plan:
    """Everything that can be refused is refused here, before any expensive work."""
    fmt = find_format(request.format)
    targets = tuple(find_target(name) for name in dict.fromkeys(request.targets))
    if not targets:
        raise DiffcError("no target", mend="name one: --target trt-rtx or --target ort")
    check_format_sms(fmt.name, fmt.min_sm, request.sms)
    if request.dtype not in ("auto", *DTYPES):
        raise unknown("dtype", request.dtype, ("auto", *DTYPES))
    _check_sms(targets, request.sms)
    for target in targets:
        target.require()
    check_output(request.output, force=request.force)
    source = locate(request.model)
    spec = find_spec(source.family)
    _check_calibration(request, fmt, source)
    dtype = stored_dtype(source) if request.dtype == "auto" else request.dtype
    if dtype == "bfloat16" and 75 in request.sms:
        raise UnsupportedError("SM75 has no bfloat16", mend="give --dtype float16, or leave out --sm 75")
    profile = parse_profile(request.profile, spec, source.config)
    if not request.skip_validation:
        _check_memory(source)
    return Plan(request, source, spec, fmt, targets, dtype, profile)


def _check_memory(source: ModelSource) -> None:
    """Raise DiffcError when validation could not hold the torch reference and ONNX Runtime side by side."""
    import math

    import psutil

    from passes.sources import safetensors_source

    parameters = sum(math.prod(safetensors_source(file, key).shape) for key, file in source.weights.items())
    needed, free = parameters * VALIDATION_BYTES, psutil.virtual_memory().available
    if needed > free:
        raise DiffcError(
            f"validating {source.name} ({parameters / 1e9:.1f} B parameters) takes about {needed / 1e9:.0f} GB of"
            f" memory, and {free / 1e9:.0f} GB are free",
            mend="compile on a machine with more memory, or give --skip-validation (the manifest then says so)",
        )


def _check_sms(targets: Sequence[Target], sms: Sequence[int]) -> None:
    ahead = [target.name for target in targets if target.ahead_of_time]
    if ahead and not sms:
        raise DiffcError(f"target {ahead[0]!r} builds for named GPUs", mend="name them: --sm 89 --sm 120")
    if sms and not ahead:
        raise DiffcError("--sm is given, and no target builds for named GPUs", mend="add --target trt-rtx")


def _check_calibration(request: CompileRequest, fmt: Format, source: ModelSource) -> None:
    if fmt.preset is None:
        if request.from_checkpoint is not None:
            raise DiffcError("format 'none' takes no checkpoint", mend="give its --format, or leave it out")
        return
    if request.from_checkpoint is None and source.pipeline_dir is None:
        raise DiffcError(
            f"{source.backbone_dir} is a backbone alone, and calibration runs the whole pipeline on prompts",
            mend="give the pipeline's folder, or --from-checkpoint with an earlier calibration",
        )


def stored_dtype(source: ModelSource) -> str:
    """The compute type of the stored weights: that of most of their tensors."""
    from collections import Counter

    import onnx

    from passes.sources import safetensors_source

    names = {int(onnx.TensorProto.FLOAT16): "float16", int(onnx.TensorProto.BFLOAT16): "bfloat16"}
    types = Counter(safetensors_source(file, key).dtype for key, file in source.weights.items())
    return names.get(types.most_common(1)[0][0], "float32")


def describe(plan: Plan) -> str:
    """One line that says what will be done."""
    sms = "".join(f" SM{sm}" for sm in plan.request.sms)
    targets = ", ".join(target.name for target in plan.targets)
    return (
        f"{plan.source.name} ({plan.spec.family}) to {plan.format.name} in {plan.dtype}, for {targets}{sms}"
    )


def quantize(plan: Plan, folder: Path, ui: Reporter) -> Checkpoint | None:
    """A calibrated checkpoint in `folder`/checkpoint: a given one, or a new one from the pipeline on prompts."""
    if plan.format.preset is None:
        return None
    from diffc.quantize.run import calibrated, given

    checkpoint = given(plan) if plan.request.from_checkpoint else calibrated(plan, ui)
    checkpoint.save(folder / "checkpoint")
    return checkpoint


def trace(plan: Plan, checkpoint: Checkpoint | None, ui: Reporter) -> onnx.ModelProto:
    """The backbone as an ONNX graph whose weights are recipes; no weight is read."""
    from diffc.frontend.trace import trace as run

    with ui.stage("trace on fake tensors"):
        return run(plan.source, dtype=plan.dtype, checkpoint=checkpoint)


def rewrite(plan: Plan, model: onnx.ModelProto, ui: Reporter) -> tuple[onnx.ModelProto, Sequence[PassRecord]]:
    """The canonical passes, then those of each target, every one checked in numbers."""
    from diffc.validate.fidelity import validation_arrays
    from diffc.validate.pass_check import NumericCheck
    from passes import Pipeline
    from passes.presets import CANONICAL, TARGETS

    steps = [*CANONICAL, *(step for target in plan.targets for step in TARGETS[target.name])]
    checker = NumericCheck(lambda: validation_arrays(plan.source, plan.dtype, plan.request.seed))
    with ui.stage("rewrite the graph") as update:
        result = Pipeline(steps).run(
            model, check=checker, dump=plan.request.dump, on_event=lambda e: update(e.index, e.total)
        )
    ui.note(f"{len(model.graph.node)} -> {len(result.model.graph.node)} nodes")
    return result.model, result.records


def write(model: onnx.ModelProto, folder: Path, ui: Reporter) -> dict[str, str]:
    """Compute the weights recipe by recipe and stream them to model.onnx_data; returns hashes by file name."""
    from passes.storage import save

    with ui.stage("write weights") as update:
        files = save(model, folder / "model.onnx", lambda done, total, name: update(done, total))
    return {file.path.name: file.sha256 for file in files}


def validate(plan: Plan, checkpoint: Checkpoint | None, folder: Path, ui: Reporter) -> Sequence[ShapeReport]:
    """ONNX Runtime against ModelOpt's fake-quantized torch model at two shapes. Raises MismatchError."""
    if plan.request.skip_validation:
        ui.note("not validated, as --skip-validation asks")
        return ()
    from diffc.validate import fidelity
    from passes.storage import load

    with ui.stage("validate against torch"):
        reports = fidelity.validate(
            load(folder / "model.onnx"),
            plan.source,
            dtype=plan.dtype,
            format=plan.format.name,
            checkpoint=checkpoint,
            shapes=fidelity.validation_shapes(plan.source),
            seed=plan.request.seed + 1,
        )
    fidelity.save_reports(reports, folder / "validation")
    fidelity.require_match(reports)
    return reports


def build(plan: Plan, folder: Path, ui: Reporter) -> Sequence[EngineReport]:
    """One engine per target and compute capability, in `folder`/engines."""
    from diffc.backends.engine import EngineRequest, build_engine

    engines = []
    for target in (t for t in plan.targets if t.is_engine):
        (folder / "engines").mkdir(exist_ok=True)
        for sms in [(sm,) for sm in plan.request.sms] if target.ahead_of_time else [()]:
            name = target.name + "".join(f"-sm{sm}" for sm in sms)
            request = EngineRequest(
                target.name,
                folder / "model.onnx",
                folder / "engines" / f"{name}.engine",
                sms,
                (engine_profile(plan),),
            )
            with ui.stage(f"build {name}") as update:
                report = build_engine(request, on_progress=lambda _, done, total: update(done, total))
            engines.append(report)
            ui.note(f"{report.nbytes / 1e6:.1f} MB, {report.layers} layers")
    return engines


def engine_profile(plan: Plan) -> Profile:
    """The shape profile as input shapes of the graph."""
    shapes = (plan.profile.minimum, plan.profile.optimum, plan.profile.maximum)
    return Profile.of(*(plan.spec.input_shapes(plan.source.config, shape) for shape in shapes))


def manifest(
    plan: Plan,
    model: onnx.ModelProto,
    records: Sequence[PassRecord],
    validation: Sequence[ShapeReport],
    engines: Sequence[EngineReport],
) -> dict[str, Any]:
    """What manifest.json says beside the files: enough to run the artifact, and to make it again."""
    request = asdict(replace(plan.request, output=Path(), force=False, dump=None))
    del request["output"], request["force"], request["dump"]
    return {
        "diffc": diffc.__version__,
        "versions": versions(),
        "model": {"name": plan.source.name, "family": plan.spec.family, "config": dict(plan.source.config)},
        "request": {k: str(v) if isinstance(v, Path) else v for k, v in request.items()},
        "format": plan.format.name,
        "dtype": plan.dtype,
        "opset": model.opset_import[0].version,
        "inputs": [_value(v) for v in model.graph.input],
        "outputs": [_value(v) for v in model.graph.output],
        "profile": asdict(plan.profile),
        "passes": [
            {"name": r.name, "changed": r.changed, "notes": list(r.notes), "check": r.check} for r in records
        ],
        "validation": [
            {
                "shape": asdict(v.shape),
                "arithmetic": v.arithmetic,
                "draw": v.draw,
                "floor": v.floor,
                "outputs": [asdict(r) for r in v.rows],
            }
            for v in validation
        ],
        "engines": [
            {
                "file": f"engines/{e.path.name}",
                "target": e.target,
                "version": e.version,
                "sms": list(e.sms),
                "layers": e.layers,
                "seconds": e.seconds,
            }
            for e in engines
        ],
    }


def _value(value: onnx.ValueInfoProto) -> Mapping[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type), "dims": dims}


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on; those that are not installed are left out."""
    known = {}
    for library in (*LIBRARIES, "tensorrt-rtx", "tensorrt-cu13"):
        try:
            known[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return known
