"""A request whose parts were found and fit together, and every refusal that needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from diffc.artifact.folder import check_output
from diffc.backends.sm import check_format_sms
from diffc.backends.target import DEFAULT_ENGINE, EngineOptions, Target, find_target
from diffc.backends.tensorrt.device import check_stripping
from diffc.compile.lora_slots import check_slots
from diffc.compile.request import DTYPES, CompileRequest
from diffc.compile.several import check_mixed
from diffc.compile.stored import AUTO, check_held, described, format_of
from diffc.errors import DiffcError, UnsupportedError, UsageError, unknown_value
from diffc.models.profiles import ShapeProfile, painted_size, parse_profile
from diffc.models.sampling import Sampling, sampling_of
from diffc.models.sources.around import with_pipeline
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.sources.loras import with_loras
from diffc.models.spec import Shape
from diffc.quantize.folder import check_place
from diffc.quantize.formats import FORMATS, MIXED, STORED, Format, find_format
from diffc.validate.shapes import usual_shapes

if TYPE_CHECKING:
    from diffc.quantize.checkpoint import Checkpoint

VALIDATION_BYTES = 16
"""Memory per parameter while validating: torch's float32 weights, and ONNX Runtime's, each twice while loading."""


@dataclass(frozen=True)
class Plan:
    """A request whose every part was found and fits together.

    `streams_validation`: the model is too large to be validated whole, see `diffc.validate.streamed`. `checkpoint` is
    the calibration of a model that was quantized in memory.
    """

    request: CompileRequest
    source: ModelSource
    format: Format
    targets: tuple[Target, ...]
    dtype: str
    profile: ShapeProfile
    streams_validation: bool = False
    checkpoint: Checkpoint | None = None

    @property
    def rounds_activations(self) -> bool:
        """Whether the compiled backbone rounds activations, and not weights alone."""
        return self.format.input is not None or self.request.options.quantizes_attention

    @property
    def calibrates(self) -> bool:
        """Whether the compile runs a calibration, which can take hours, instead of taking one that is there."""
        return (
            self.format.algorithm is not None
            and self.request.from_checkpoint is None
            and self.checkpoint is None
        )

    @property
    def runs_pipeline(self) -> bool:
        """Whether the compile runs the pipeline on prompts to calibrate."""
        return self.calibrates and self.request.calibrate == "pipeline"

    @cached_property
    def sampling(self) -> Sampling:
        """Denoising steps and guidance of calibration: those asked for, otherwise those that the pipeline tells."""
        usual, request = sampling_of(self.source), self.request
        asked = request.steps is not None or request.guidance is not None
        guidance = usual.guidance if request.guidance is None else request.guidance
        return Sampling(request.steps or usual.steps, guidance, "" if asked else usual.why)

    @property
    def validation_shapes(self) -> tuple[Shape, ...]:
        """The shapes of validation: small ones, inside the profile where a target builds an engine for it."""
        engines = any(target.is_engine for target in self.targets)
        profile = self.profile if engines else None
        return usual_shapes(self.source.family, self.source.config, self.profile.batch, profile)

    @property
    def no_measurement(self) -> str:
        """Why the pipeline cannot be run to measure rounding noise; empty where it can."""
        if self.request.skip_validation:
            return "as --skip-validation asks"
        if self.streams_validation:
            return "the model is too large to run it whole"
        if not self.source.has_pipeline or self.request.calibrate == "synthetic":
            return "there is no pipeline to run"
        try:
            check_components(self.source)
        except DiffcError as error:
            return f"the pipeline is not complete ({error.what})"
        return ""


def check(
    request: CompileRequest, source: ModelSource | None = None, checkpoint: Checkpoint | None = None
) -> Plan:
    """Everything that can be refused is refused here, before any expensive work.

    `source` is the model where it is in memory, and `checkpoint` its calibration where it was quantized there.
    """
    fmt = FORMATS["none"] if request.format == AUTO else find_format(request.format)
    targets = tuple(find_target(name) for name in dict.fromkeys(request.targets))
    request.options.check(fmt)
    check_format_sms(fmt.name, fmt.min_sm, request.sms)
    if request.dtype not in ("auto", *DTYPES):
        raise unknown_value("dtype", request.dtype, ("auto", *DTYPES))
    _ = request.own_passes  # raises PassError for an unknown one
    check_targets(targets, request.sms)
    check_engine(targets, request.engine)
    check_slots(request)
    for target in targets:
        target.check_format(fmt.name)
    check_output(request.output, force=request.force)
    source = source or locate(request.model, request.hub)
    if request.pipeline is not None:
        source = with_pipeline(source, request.pipeline, request.hub)
    fmt = format_of(request.format, source)
    if fmt is MIXED:
        check_mixed(request.from_checkpoint, targets, request.sms)
    source = _fused(request, fmt, source)
    if fmt is STORED:
        source = source.as_held()
        check_held(source, targets, request.sms)
    _check_calibration(request, fmt, source, calibrated=checkpoint is not None)
    _check_images(request, source)
    dtype = source.dtype if request.dtype == "auto" else request.dtype
    if dtype != "float16" and 75 in request.sms:
        raise UnsupportedError(
            f"the compiler has no {dtype} matrix product for SM75",
            fix="give --dtype float16, or leave out --sm 75",
        )
    if dtype == "float32" and request.options.quantizes_attention and any(t.is_engine for t in targets):
        raise UnsupportedError(
            "TensorRT has no attention in float32, so none that runs in FP8 beside it",
            fix="give --dtype float16 or bfloat16, or leave out --quantize-mha",
        )
    profile = parse_profile(request.profile, source.family, source.config, _painted(source))
    streams = not request.skip_validation and not _fits_memory(source)
    return Plan(request, source, fmt, targets, dtype, profile, streams, checkpoint)


def _painted(source: ModelSource) -> int | None:
    """The image size of the pipeline's VAE, in pixels; None where there is no VAE."""
    if source.pipeline is None:
        return painted_size(source.pipeline_dir)
    config = getattr(getattr(source.pipeline, "vae", None), "config", None)
    return getattr(config, "sample_size", None)


def _fits_memory(source: ModelSource) -> bool:
    """Whether validation could hold the torch reference and ONNX Runtime side by side in what memory is free."""
    import psutil

    return source.parameters * VALIDATION_BYTES <= int(psutil.virtual_memory().available)


def _fused(request: CompileRequest, fmt: Format, source: ModelSource) -> ModelSource:
    """The source with the LoRAs of the request. Raises DiffcError where its weights cannot take any."""
    if request.loras and fmt is STORED:
        raise UnsupportedError(
            f"{source.path} is quantized, and its codes are kept, which take no LoRA",
            fix="give the model in 16 bits, or a --format to quantize it anew",
        )
    if request.loras and source.origin is not None:
        raise UnsupportedError(
            "a model in memory takes no --lora",
            fix="call load_lora_weights() and fuse_lora() of the pipeline, or give its folder",
        )
    return with_loras(source, request.loras, request.hub, partial=request.lora_partial)


def check_targets(targets: Sequence[Target], sms: Sequence[int]) -> None:
    """Raise DiffcError when there is no target, one is not installed, or they and the GPUs do not go together."""
    if not targets:
        raise UsageError("no target", fix="name one: --target trt-rtx or --target ort")
    _check_sms(targets, sms)
    for target in targets:
        target.require()


def check_engine(targets: Sequence[Target], options: EngineOptions) -> None:
    """Raise DiffcError when the options of the builder are none, or there is nothing to build, or no way here."""
    level = options.optimization_level
    if level is not None and not 0 <= level <= 5:
        raise UsageError(f"the builder has no optimization level {level}", fix="give 0 (fast build) to 5")
    if options != DEFAULT_ENGINE and not any(target.is_engine for target in targets):
        raise UsageError(
            "options of the engine builder were given, and no target builds an engine",
            fix="add --target trt-rtx or --target tensorrt, or leave the options out",
        )
    if options.strip_weights:
        check_stripping()


def _check_sms(targets: Sequence[Target], sms: Sequence[int]) -> None:
    ahead = [target.name for target in targets if target.ahead_of_time]
    if ahead and not sms:
        raise UsageError(f"target {ahead[0]!r} builds for named GPUs", fix="name them: --sm 89 --sm 120")
    if sms and not ahead:
        raise UsageError("--sm is given, and no target builds for named GPUs", fix="add --target trt-rtx")


def _check_images(request: CompileRequest, source: ModelSource) -> None:
    """Raise UsageError for a size of calibration images that the model cannot paint."""
    height, width = (size or request.image_size for size in (request.height, request.width))
    usual = source.family.pixel_multiple(source.config)
    if height or width:
        source.family.check(
            source.config, Shape(1, height or usual, width or usual, 1, source.family.video_frames(1))
        )


def _check_calibration(
    request: CompileRequest, fmt: Format, source: ModelSource, *, calibrated: bool
) -> None:
    for name, dtype in request.component_dtypes:
        if dtype not in DTYPES:
            raise unknown_value(f"dtype of component {name!r}", dtype, DTYPES)
    if request.calibrate not in ("pipeline", "synthetic"):
        raise unknown_value("way to calibrate", request.calibrate, ("pipeline", "synthetic"))
    if request.save_checkpoint is not None:
        if not fmt.quantizes:
            raise UsageError(
                f"format {fmt.name!r} has no calibration to save",
                fix="give --format, or no --save-checkpoint",
            )
        check_place(request.save_checkpoint)
    if not fmt.quantizes:
        if request.from_checkpoint is not None:
            raise UsageError(
                f"format {fmt.name!r} takes no checkpoint", fix="give its --format, or leave it out"
            )
        return
    if calibrated or fmt.algorithm is None or request.calibrate == "synthetic":
        return  # no pipeline is needed
    if request.from_checkpoint is None and not source.has_pipeline:
        raise DiffcError(
            f"{source.path} is a backbone alone, and calibration runs the whole pipeline on prompts",
            fix="give the pipeline's folder, --pipeline with one around it, --from-checkpoint with an earlier"
            " calibration, or, to try a compile,"
            " --calibrate synthetic",
        )
    if request.from_checkpoint is None:
        check_components(source)


def describe(plan: Plan) -> str:
    """One line that says what will be done."""
    sms = "".join(f" SM{sm}" for sm in plan.request.sms)
    targets = ", ".join(target.name for target in plan.targets)
    line = (
        f"{plan.source.name} ({plan.source.family}) to {plan.format.name} in {plan.dtype}, for {targets}{sms}"
    )
    if not plan.source.held:
        return line
    if plan.format is STORED:
        return f"{line}: {described(plan.source)} layers as the file holds them"
    return f"{line}; its own codes ({described(plan.source)}) are expanded: --format stored keeps them"


def assumed(plan: Plan) -> tuple[str, ...]:
    """What is taken for granted of a backbone that no family file describes: lines for the user."""
    interface = plan.source.family.interface
    return () if interface is None else interface.assumed
