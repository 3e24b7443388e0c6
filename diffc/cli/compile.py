"""`diffc compile`: a backbone into a validated ONNX model and engines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples
from diffc.cli.guidance import guidance_option
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal
    from diffc.compile.request import CompileRequest

EXAMPLES = examples(
    "diffc compile digits-sd3 --format fp8 -o build/digits",
    "diffc compile PIPELINE --format fp8 --target trt-rtx --sm 89 --sm 120 -o build/fp8",
    "diffc compile PIPELINE --format auto --bits 5.5 -o build/mixed",
    "diffc compile PIPELINE --format nvfp4 --target trt-rtx --sm 120 --profile batch=1:2:4 -o build/nvfp4",
    "diffc compile stabilityai/sdxl-turbo --variant fp16 --format fp8 -o build/turbo",
    "diffc compile exported.onnx --target trt-rtx --sm 89 -o build/imported",
)
_QUANTIZE, _CALIBRATE = "Quantization", "Calibration (of formats that need it)"
_LORA = "LoRA"
_CACHE, _ENGINES, _CHECK = "Cache diffusion", "Engines", "Checks and output"


def compile_command(
    terminal: Terminal,
    model: Annotated[
        str,
        typer.Argument(
            help="A pipeline or backbone folder, a file, OWNER/NAME of the hub, an .onnx file, or an embedded model.",
            autocompletion=completed(choices.models),
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the artifact.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            metavar="FORMAT",
            help="{formats}; ModelOpt's names too (fp4); stored keeps a quantized file's own codes.",
            show_default="none; stored for a quantized file",
            autocompletion=completed(choices.formats),
        ),
    ] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TARGET",
            help="What runs the result: {targets}; repeatable.",
            show_default="ort",
            autocompletion=completed(choices.targets),
        ),
    ] = None,
    sm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="Compute capability to build for, with target trt-rtx: {sms}; repeatable.",
            autocompletion=completed(choices.sms),
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Compute type: {dtypes}, or Half, BFloat16; auto is the type of the stored weights.",
            autocompletion=completed(lambda: choices.DTYPES),
        ),
    ] = "auto",
    profile: Annotated[
        str,
        typer.Option(
            metavar="RANGES",
            help="Shapes to build for, such as batch=1:2:4,height=512:1024:1536,text=77:154:512.",
            show_default="half to 1.5 times the model's own size",
        ),
    ] = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=WEIGHT]",
            help="A LoRA to fuse into the weights, a file or OWNER/NAME; FILE=0.8,PATTERN=WEIGHT for single layers;"
            " repeatable.",
            rich_help_panel=_LORA,
        ),
    ] = None,
    lora_partial: Annotated[
        bool,
        typer.Option(
            "--lora-partial", help="Leave out keys of a LoRA that fit no layer.", rich_help_panel=_LORA
        ),
    ] = False,
    lora_slots: Annotated[
        int,
        typer.Option(
            metavar="RANK",
            help="Let the compiled model take LoRAs up to this rank when it runs (target ort).",
            show_default="no slots",
            rich_help_panel=_LORA,
        ),
    ] = 0,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
    quantize_mha: Annotated[
        bool,
        typer.Option("--quantize-mha", help="Attention's q, k and v in FP8, too.", rich_help_panel=_QUANTIZE),
    ] = False,
    quant_level: Annotated[
        float,
        typer.Option(
            metavar="LEVEL",
            help="1 convolutions, 2 + feed-forward, 2.5 + q k v, 3 + all linear, 4 + attention.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = 3.0,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Module paths to leave unquantized, such as '*.ff.*'; repeatable.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = None,
    alpha: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="SmoothQuant: share moved into the weights, 0 to 1.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = 1.0,
    lowrank: Annotated[
        int,
        typer.Option(metavar="RANK", help="Rank of SVDQuant's branch.", rich_help_panel=_QUANTIZE),
    ] = 32,
    block_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="Elements that share a scale: 32, 64 or 128, for int4_awq and w4a8_awq.",
            show_default="the format's",
            rich_help_panel=_QUANTIZE,
        ),
    ] = None,
    weight_scales: Annotated[
        str,
        typer.Option(
            "--weight-scales",
            metavar="WAY",
            help="Block scales of NVFP4 weights: max, or four-six (each block's largest at 6 or 4).",
            rich_help_panel=_QUANTIZE,
            autocompletion=completed(choices.weight_scales),
        ),
    ] = "max",
    awq: Annotated[
        str,
        typer.Option(
            metavar="WAY",
            help="int4_awq and w4a8_awq: lite (channel factors), or full (and blocks that are clipped).",
            rich_help_panel=_QUANTIZE,
            autocompletion=completed(lambda: ("lite", "full")),
        ),
    ] = "lite",
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="With --format auto: a format for each layer, at most so many bits a weight.",
            min=1,
            rich_help_panel=_QUANTIZE,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="With --format auto: a format for each layer, at most 6GB of weights, say.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB",
            help="With --format auto: the smallest mix whose pictures are that near to the unquantized model's.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = None,
    percentile: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of steps, for inputs of INT8 convolutions.",
            rich_help_panel=_QUANTIZE,
        ),
    ] = 1.0,
    collect_method: Annotated[
        str,
        typer.Option(
            metavar="METHOD",
            help="{collect_methods}; with --percentile.",
            rich_help_panel=_QUANTIZE,
            autocompletion=completed(choices.collect_methods),
        ),
    ] = "default",
    calibrate: Annotated[
        str,
        typer.Option(
            metavar="WAY",
            help="pipeline (on prompts), or synthetic (random inputs, layer by layer: little memory).",
            rich_help_panel=_CALIBRATE,
            autocompletion=completed(lambda: choices.CALIBRATE),
        ),
    ] = "pipeline",
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            help="Pipeline around a MODEL that is a backbone alone or one file, to calibrate with.",
            show_default=False,
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    from_checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Calibration to use again: ARTIFACT/checkpoint, a .pt of ModelOpt, or the folder that has it.",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    save_checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save the calibration here too, as soon as it is finished.",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts: a text file with one a line, CSV, JSON, JSON lines, parquet, or the folder of a data set.",
            show_default="diffc's own 12",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    calib_size: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="How many prompts to use.",
            min=1,
            max=choices.MOST,
            show_default="all",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            metavar="COUNT", help="Prompts at a time.", min=1, max=choices.MOST, rich_help_panel=_CALIBRATE
        ),
    ] = 4,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            "--n-steps",
            metavar="COUNT",
            help="Denoising steps of a prompt.",
            min=1,
            max=choices.MOST,
            show_default="20; 4 for turbo models",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    guidance: Annotated[float | None, guidance_option(_CALIBRATE)] = None,
    negative_prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What not to paint.", show_default="none", rich_help_panel=_CALIBRATE
        ),
    ] = "",
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Height and width of the images.",
            min=1,
            max=choices.MOST,
            show_default="the model's",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Height.",
            min=1,
            max=choices.MOST,
            show_default="--image-size",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Width.",
            min=1,
            max=choices.MOST,
            show_default="--image-size",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    component_dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:TYPE",
            help="Type of a component on a GPU, such as vae:float32; repeatable.",
            rich_help_panel=_CALIBRATE,
        ),
    ] = None,
    cache_plan: Annotated[
        str,
        typer.Option(
            metavar="PLAN",
            help="Blocks to use again between steps: a plan of `diffc cache list`, or a file.",
            show_default=False,
            rich_help_panel=_CACHE,
            autocompletion=completed(choices.cache_plans),
        ),
    ] = "",
    cache_layout: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help="full+reduced (two models), or segments (which share no weight).",
            rich_help_panel=_CACHE,
        ),
    ] = "full+reduced",
    optimization_level: Annotated[
        int | None,
        typer.Option(
            metavar="LEVEL",
            help="0 (fast build) to 5.",
            show_default="the builder's",
            rich_help_panel=_ENGINES,
        ),
    ] = None,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming",
            help="Engines that run with part of the weights on the GPU.",
            rich_help_panel=_ENGINES,
        ),
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option(
            "--strip-weights",
            help="Engines without weights (building them needs the GPU).",
            rich_help_panel=_ENGINES,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            metavar="SEED",
            help="Seed of calibration noise and validation inputs.",
            min=0,
            max=2**32 - 1,
            rich_help_panel=_CHECK,
        ),
    ] = 0,
    skip_validation: Annotated[
        bool,
        typer.Option(
            "--skip-validation", help="Do not compare the result with torch.", rich_help_panel=_CHECK
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the request, say what would be made and how large, and stop.",
            rich_help_panel=_CHECK,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an artifact at -o.", rich_help_panel=_CHECK)
    ] = False,
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            metavar="PASSES",
            help="More passes, after the canonical ones: 'name{option=value},name'; see `diffc passes`.",
            rich_help_panel=_CHECK,
        ),
    ] = "",
    dump: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the graph after every pass to this folder.", rich_help_panel=_CHECK
        ),
    ] = None,
) -> None:
    """Compile a backbone into a validated ONNX model and engines."""
    from diffc.cli.tables import compiled, planned, planned_from_file
    from diffc.compile.plan import check

    request = request_of(locals())
    if (bits, size, psnr) != (None, None, None):
        if dry_run:
            _planned_mix(request, bits, size, psnr, terminal)
            return
        request = _mixed(request, bits, size, psnr, terminal)
    if dry_run and model.endswith(".onnx"):
        from diffc.compile.onnx_model import check_request

        planned_from_file(request, check_request(request), terminal)
        return
    if dry_run:
        planned(check(request), terminal)
        return
    if not model.endswith(".onnx"):
        check(request)  # what is wrong is said at once: the import of torch takes seconds
    from diffc.compile.spine import compile_model

    started = time.perf_counter()
    result = compile_model(request, terminal.ui)
    compiled(result, time.perf_counter() - started, terminal)


def _mixed(
    request: CompileRequest, bits: float | None, size: str | None, psnr: float | None, terminal: Terminal
) -> CompileRequest:
    """Choose a format for each layer; the request that compiles the choice."""
    from diffc.cli.mix import bytes_of
    from diffc.commands.mix.run import lines, mixed_request

    limit = None if size is None else bytes_of(size)
    chosen, found = mixed_request(request, terminal.ui, bits=bits, size=limit, psnr=psnr)
    for line in lines(found):
        terminal.line(line)
    terminal.line(f"The plan: {chosen.from_checkpoint}.plan.json")
    return chosen


def _planned_mix(
    request: CompileRequest, bits: float | None, size: str | None, psnr: float | None, terminal: Terminal
) -> None:
    """Say what `_mixed` would measure, and stop."""
    from diffc.cli.mix import bytes_of
    from diffc.commands.mix.run import checked_mix

    limit = None if size is None else bytes_of(size)
    wanted, plan = checked_mix(request, bits=bits, size=limit, psnr=psnr)
    formats, targets = ", ".join(wanted.formats), ", ".join(request.targets)
    terminal.line(f"Would compile {plan.source.name}: measure what each layer loses in {formats},")
    terminal.line(f"choose a format for each, and compile that in {plan.dtype}, for {targets}")
    terminal.line(f"The calibration would go to {wanted.output}, the plan to {wanted.output}.plan.json")
    terminal.line(f"Nothing was written to {request.output}")


def request_of(values: Mapping[str, Any]) -> CompileRequest:
    """The request of the options of `diffc compile`, by the names of its parameters. Raises DiffcError."""
    from diffc.backends.sm import parse_sm
    from diffc.backends.target import EngineOptions
    from diffc.compile.prompts import read_prompts
    from diffc.compile.request import CompileRequest, parse_component_dtype
    from diffc.models.sources.lora_files import parse_lora
    from diffc.models.sources.source import HubOptions
    from diffc.quantize.options import QuantOptions

    v = SimpleNamespace(**values)
    return CompileRequest(
        model=v.model,
        output=v.output.expanduser().absolute(),
        format=v.format,
        targets=tuple(v.target or ["ort"]),
        sms=tuple(dict.fromkeys(parse_sm(text) for text in v.sm or [])),
        dtype=v.dtype,
        profile=v.profile,
        from_checkpoint=v.from_checkpoint,
        pipeline=v.pipeline,
        save_checkpoint=v.save_checkpoint and v.save_checkpoint.expanduser().absolute(),
        options=QuantOptions(
            v.quantize_mha,
            v.quant_level,
            v.alpha,
            v.percentile,
            v.collect_method,
            v.lowrank,
            v.block_size,
            tuple(v.keep or ()),
            v.weight_scales,
            v.awq,
        ),
        calib_size=v.calib_size,
        calibrate=v.calibrate,
        engine=EngineOptions(v.optimization_level, v.weight_streaming, v.strip_weights),
        component_dtypes=tuple(map(parse_component_dtype, v.component_dtype or ())),
        prompts=None if v.prompts_file is None else read_prompts(v.prompts_file, v.calib_size),
        steps=v.steps,
        guidance=v.guidance,
        negative_prompt=v.negative_prompt,
        batch_size=v.batch_size,
        image_size=v.image_size,
        height=v.height,
        width=v.width,
        seed=v.seed,
        loras=tuple(map(parse_lora, v.lora or ())),
        lora_partial=v.lora_partial,
        lora_slots=v.lora_slots,
        cache_plan=v.cache_plan,
        cache_layout=v.cache_layout,
        passes=v.passes,
        skip_validation=v.skip_validation,
        force=v.force,
        dump=v.dump,
        hub=HubOptions(v.revision, v.variant, v.subfolder, v.token, v.cache_dir),
    )
