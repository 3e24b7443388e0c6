"""`diffc mix`: layers of one model in several formats, chosen by what each costs at the output, as one calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from diffc.backends.sm import check_format_sms
from diffc.backends.target import find_target
from diffc.commands.mix.measured import Measured
from diffc.commands.mix.plot import draw
from diffc.commands.mix.request import MIXABLE, Mix, MixRequest
from diffc.compile.calibration import PipelineRun, calibrate_on_prompts
from diffc.compile.plan import Plan, check
from diffc.compile.quantize import pipeline_run
from diffc.compile.request import CompileRequest
from diffc.errors import UnsupportedError, UsageError
from diffc.models.sampling import sampling_of
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import locate
from diffc.models.sources.source import ModelSource
from diffc.progress import Reporter
from diffc.quality.mixing import read_plan, write_plan
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.folder import check_place
from diffc.quantize.formats import MIXED, find_format
from diffc.quantize.mix import mixed
from diffc.quantize.options import DEFAULT_OPTIONS, QuantOptions

UNSEEN_NOISE = 1 << 20
"""Between the seed of calibration's noise and that of the calls."""


def mix(request: MixRequest, ui: Reporter, source: ModelSource | None = None) -> list[Mix]:
    """Choose, calibrate and save to `output`; the chosen mix, and then every format by itself.

    `source` is the model where it is known already. A plan beside the calibration (NAME.plan.json) has the format of
    each layer. Raises UsageError where nothing fits.
    """
    request.check()
    source = source or locate(request.model, request.hub)
    check_components(source)
    plan = None if request.plan is None else read_plan(request.plan)
    names = (
        request.formats if plan is None else [name for name in dict.fromkeys(plan.values()) if name != "none"]
    )
    run = request.run or _run_of(request, source)
    checkpoints = _calibrated(request, source, names, run, ui)
    if plan is not None:
        mixed(checkpoints, plan).save(request.output)
        return []
    with quiet_libraries(), run.opened(source) as pipe:
        seed, decodes = request.seed + UNSEEN_NOISE, request.psnr is not None
        found = Measured(source, run, pipe, checkpoints, seed, ui, decodes=decodes)
        tried = found.uniform()
        best = _best(request, found, tried)
        if request.plot is not None:
            draw(tried, found.curve(tried), best, request.plot)
    mixed(checkpoints, best.formats).save(request.output)
    about = {"model": source.name, "bits": round(best.bits, 4), "snr_db": round(best.snr, 2)}
    about |= {} if best.psnr is None else {"psnr_db": round(best.psnr, 2)}
    write_plan(request.output.with_name(f"{request.output.name}.plan.json"), best.formats, about)
    return [best, *tried]


def _calibrated(
    request: MixRequest, source: ModelSource, names: Sequence[str], run: PipelineRun, ui: Reporter
) -> Mapping[str, Checkpoint]:
    """A calibration for each format."""
    return {
        fmt.name: calibrate_on_prompts(
            source, fmt, _fitting(request.options, fmt.name), run, ui, count=request.calib_size
        )
        for fmt in map(find_format, names)
    }


def _fitting(options: QuantOptions, name: str) -> QuantOptions:
    """Those of the options that the format `name` takes: which layers, and what is its own."""
    fitting = replace(DEFAULT_OPTIONS, level=options.level, keep=options.keep)
    for field in ("weight_scales", "lowrank", "alpha", "block_size"):
        tried = replace(fitting, **{field: getattr(options, field)})
        with suppress(UnsupportedError):
            tried.check(find_format(name))
            fitting = tried
    return fitting


def _best(request: MixRequest, found: Measured, uniform: Sequence[Mix]) -> Mix:
    """The mix that is asked for. Raises UsageError where no format helps."""
    if request.psnr is None:
        bits = request.bits
        budget = found.bits_of_size(request.size or 0) if bits is None else bits * found.weights
        return found.best(budget, uniform)
    best = found.smallest(request.psnr, uniform)
    if best.name == "none":
        raise UsageError(
            f"no mix of {', '.join(one.name for one in uniform)} paints within {request.psnr:g} dB",
            fix="ask for less, add a --format of more bits, or compile with --format none",
        )
    return best


def _run_of(request: MixRequest, source: ModelSource) -> PipelineRun:
    sampling, pixels = sampling_of(source), request.image_size
    return PipelineRun(
        request.prompts,
        request.steps or sampling.steps,
        request.batch_size,
        pixels,
        pixels,
        request.seed,
        source.dtype,
        guidance=sampling.guidance,
    )


def mixed_request(
    request: CompileRequest,
    ui: Reporter,
    *,
    bits: float | None = None,
    size: int | None = None,
    psnr: float | None = None,
) -> tuple[CompileRequest, list[Mix]]:
    """Make the mix that a compile of format "auto" asks for; the request that compiles it, and what `mix` found.

    The calibration is written to `save_checkpoint`, or beside the artifact (OUTPUT.mixed), the plan next to it. Layers
    have those of `MIXABLE` that all targets and GPUs of the request have. Raises DiffcError as `check` does, and
    UsageError for what does not go together with a mix.
    """
    wanted, plan = checked_mix(request, bits=bits, size=size, psnr=psnr)
    found = mix(wanted, ui, plan.source)
    compiled = replace(
        request,
        format=MIXED.name,
        options=DEFAULT_OPTIONS,
        from_checkpoint=wanted.output,
        save_checkpoint=None,
        calib_size=None,
    )
    return compiled, found


def checked_mix(
    request: CompileRequest, *, bits: float | None = None, size: int | None = None, psnr: float | None = None
) -> tuple[MixRequest, Plan]:
    """What `mixed_request` measures, and the compile without quantization that it starts from; nothing is run.

    Raises as `mixed_request` does.
    """
    wanted = MixRequest(request.model, _place(request), bits, size, psnr=psnr, seed=request.seed)
    wanted.check()
    _check_mixable(request)
    check_place(wanted.output)
    unquantized = replace(request, format="none", options=DEFAULT_OPTIONS)
    plan = check(unquantized)
    wanted = replace(
        wanted,
        formats=_available(request),
        options=request.options,
        run=pipeline_run(plan),
        calib_size=request.calib_size,
    )
    return wanted, plan


def _place(request: CompileRequest) -> Path:
    return request.save_checkpoint or request.output.with_name(f"{request.output.name}.{MIXED.name}")


def _check_mixable(request: CompileRequest) -> None:
    """Raise UsageError for a request that no mix can be made for."""
    what, fix = "", ""
    if request.format != "auto":
        what, fix = f"format {request.format!r} is one format", "give --format auto, or leave the limit out"
    elif request.from_checkpoint is not None:
        what, fix = "--from-checkpoint is a calibration, and a mix is a new one", "leave one of the two out"
    elif request.calibrate != "pipeline":
        what, fix = "random inputs say nothing of pictures", "leave --calibrate out"
    elif request.model.endswith(".onnx"):
        what, fix = "the layers of an .onnx file are quantized already or not at all", "give a pipeline"
    elif request.options.quantizes_attention:
        what, fix = "attention is not part of a mix", "leave out --quantize-mha and --quant-level 4"
    if what:
        raise UsageError(f"--bits, --size and --psnr choose a format for each layer: {what}", fix=fix)


def _available(request: CompileRequest) -> tuple[str, ...]:
    """The formats of a mix that all targets and GPUs have. Raises UnsupportedError where there is none."""
    found = []
    for name in MIXABLE:
        with suppress(UnsupportedError):
            check_format_sms(name, find_format(name).min_sm, request.sms)
            for target in request.targets:
                find_target(target).check_format(name)
            found.append(name)
    if not found:
        raise UnsupportedError(
            f"no target and GPU that is asked for has {', '.join(MIXABLE)}", fix="compile with --format none"
        )
    return tuple(found)


def lines(mixes: Sequence[Mix]) -> Iterator[str]:
    """The mixes as lines for a user."""
    for one in mixes:
        pictures = "" if one.psnr is None else f"  pictures {one.psnr:.1f} dB"
        yield f"{one.name:>16}  {one.bits:5.2f} bits  {one.snr:5.1f} dB{pictures}"
