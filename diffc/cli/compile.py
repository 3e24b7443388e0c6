"""`diffc compile`: a backbone into a validated ONNX model and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compile_command(
    model: Annotated[
        str, typer.Argument(help="A pipeline or backbone folder, an .onnx file, or an embedded model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact.")],
    format: Annotated[str, typer.Option(help="A format of `diffc formats`, such as fp8 or nvfp4.")] = "none",
    target: Annotated[
        list[str] | None, typer.Option(help="trt-rtx, tensorrt or ort; repeatable. [default: ort]")
    ] = None,
    sm: Annotated[
        list[str] | None, typer.Option(help="Compute capability for trt-rtx, such as 89; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")] = "auto",
    profile: Annotated[
        str, typer.Option(help="Shape ranges, such as batch=1:2:4,height=512:1024:1536,text=77:154:512.")
    ] = "",
    from_checkpoint: Annotated[
        Path | None, typer.Option(help="Calibration to reuse: ARTIFACT/checkpoint, or a .pt of ModelOpt.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Calibration prompts, one a line.")] = None,
    steps: Annotated[
        int, typer.Option("--steps", "--n-steps", help="Denoising steps a calibration prompt.", min=1)
    ] = 20,
    calibrate: Annotated[
        str,
        typer.Option(help="pipeline (on prompts), or synthetic (random inputs, layer by layer, no room)."),
    ] = "pipeline",
    calib_size: Annotated[
        int | None, typer.Option(help="How many prompts to calibrate with. [default: all]", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Calibration prompts at a time.", min=1)] = 4,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of calibration images. [default: the model's]", min=1)
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of calibration noise and validation inputs.", min=0, max=2**32 - 1)
    ] = 0,
    quantize_mha: Annotated[
        bool, typer.Option("--quantize-mha", help="Attention's q, k and v in FP8, too.")
    ] = False,
    quant_level: Annotated[
        float,
        typer.Option(help="1 convolutions, 2 + feed-forward, 2.5 + q k v, 3 + all linear, 4 + attention."),
    ] = 3.0,
    alpha: Annotated[float, typer.Option(help="SmoothQuant: share moved into the weights.")] = 1.0,
    percentile: Annotated[float, typer.Option(help="Share of steps, for inputs of INT8 convolutions.")] = 1.0,
    collect_method: Annotated[
        str, typer.Option(help="default, global_min, min-max, min-mean or mean-max; with --percentile.")
    ] = "default",
    lowrank: Annotated[int, typer.Option(help="Rank of SVDQuant's branch.")] = 32,
    block_size: Annotated[
        int | None, typer.Option(help="Elements that share a scale. [default: the format's]")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Module paths to leave unquantized, such as '*.ff.*'; repeatable."),
    ] = None,
    component_dtype: Annotated[
        list[str] | None, typer.Option(help="Type of a component while calibrating on a GPU: vae:float32.")
    ] = None,
    cache_plan: Annotated[
        str,
        typer.Option(help="Blocks to use again between steps: a preset of `diffc cache list`, or a file."),
    ] = "",
    cache_layout: Annotated[
        str, typer.Option(help="Models of a cache plan: full+reduced, or segments, which share no weight.")
    ] = "full+reduced",
    optimization_level: Annotated[
        int | None, typer.Option(help="Of the engine builder: 0 (fast build) to 5. [default: its own]")
    ] = None,
    weight_streaming: Annotated[
        bool, typer.Option("--weight-streaming", help="Engines that run with part of the weights on the GPU.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Engines without weights (needs the GPU while building).")
    ] = False,
    skip_validation: Annotated[
        bool, typer.Option("--skip-validation", help="Do not run the result against torch.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact at -o.")] = False,
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass to this folder.")
    ] = None,
) -> None:
    """Compile a backbone into a validated ONNX model and engines."""
    from diffc.backends.target import EngineOptions, parse_sm
    from diffc.cli.tables import compiled
    from diffc.cli.terminal import Terminal
    from diffc.compile.plan import check
    from diffc.compile.request import CompileRequest
    from diffc.quantize.options import QuantOptions

    request = CompileRequest(
        model=model,
        output=output.expanduser().absolute(),
        format=format,
        targets=tuple(target or ["ort"]),
        sms=tuple(dict.fromkeys(parse_sm(text) for text in sm or [])),
        dtype=dtype,
        profile=profile,
        from_checkpoint=from_checkpoint,
        options=QuantOptions(
            quantize_mha,
            quant_level,
            alpha,
            percentile,
            collect_method,
            lowrank,
            block_size,
            tuple(keep or ()),
        ),
        calib_size=calib_size,
        calibrate=calibrate,
        engine=EngineOptions(optimization_level, weight_streaming, strip_weights),
        component_dtypes=tuple(_component_dtype(text) for text in component_dtype or []),
        prompts=_prompts(prompts_file),
        steps=steps,
        batch_size=batch_size,
        image_size=image_size,
        seed=seed,
        cache_plan=cache_plan,
        cache_layout=cache_layout,
        skip_validation=skip_validation,
        force=force,
        dump=dump,
    )
    if not model.endswith(".onnx"):
        check(request)  # what is wrong is said at once: the import of torch takes seconds
    from diffc.compile.spine import compile_model

    ui = Terminal()
    compiled(compile_model(request, ui), ui.console)


def _component_dtype(text: str) -> tuple[str, str]:
    from diffc.errors import DiffcError

    name, colon, dtype = text.partition(":")
    if not (name and colon and dtype):
        raise DiffcError(f"--component-dtype is {text!r}", fix="write COMPONENT:TYPE, such as vae:float32")
    short = {"Half": "float16", "BFloat16": "bfloat16", "Float": "float32"}  # ModelOpt's names
    return name, short.get(dtype, dtype)


def _prompts(path: Path | None) -> tuple[str, ...] | None:
    from diffc.errors import DiffcError

    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DiffcError(
            f"cannot read the prompts file {path}: {error}", fix="give a UTF-8 text file"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DiffcError(f"{path} holds no prompt", fix="write one prompt a line")
    return prompts
