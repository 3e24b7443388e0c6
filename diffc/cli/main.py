"""The command line: each subcommand parses, calls one function, prints, and returns a code.

Heavy libraries are imported inside the commands, so that `diffc --help` is instant.
"""

from __future__ import annotations

import errno
import gc
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from diffc.cli.bench import bench_command
from diffc.cli.cache import cache_app
from diffc.cli.generate import generate_command
from diffc.cli.package import package_command
from diffc.cli.validate import validate_command
from diffc.version import VERSION

app = typer.Typer(
    name="diffc",
    help="Compile diffusion backbones: diffusers + ModelOpt -> ONNX -> TensorRT, TensorRT-RTX, ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(
    help="The models that diffc knows by name: list them, or write one as a folder.", no_args_is_help=True
)
app.add_typer(models_app, name="models")
app.add_typer(cache_app, name="cache")
app.command("validate")(validate_command)
app.command("generate")(generate_command)
app.command("bench")(bench_command)
app.command("package")(package_command)


@app.command("compile")
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


@app.command("opt")
def opt_command(
    model: Annotated[Path, typer.Argument(help="An .onnx file, its weights beside it.")],
    passes: Annotated[
        str, typer.Option("--passes", "-p", help="'name{option=value},name'; see `diffc passes`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    check: Annotated[
        str, typer.Option(help="numeric (before = after in ONNX Runtime) or structure.")
    ] = "structure",
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Run passes over an ONNX model."""
    from diffc.cli.tables import optimized
    from diffc.cli.terminal import Terminal
    from diffc.commands.optimize import optimize

    ui = Terminal()
    optimized(optimize(model, passes, output, check=check, dump=dump, force=force, ui=ui), output, ui.console)


@app.command("import")
def import_command(
    model: Annotated[
        Path, typer.Argument(help="An .onnx file that ModelOpt exported, its weights beside it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx file to write.")],
    dump: Annotated[
        Path | None, typer.Option(help="Write the graph after every pass to this folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
) -> None:
    """Bring an ONNX model of ModelOpt's scripts to the canonical form, its weights compressed."""
    from diffc.cli.tables import optimized
    from diffc.cli.terminal import Terminal
    from diffc.compile.import_onnx import import_file

    ui = Terminal()
    optimized(import_file(model, output, dump=dump, force=force, ui=ui), output, ui.console)


@app.command("passes")
def passes_command() -> None:
    """List the passes, their options and what they do."""
    from diffc.cli.tables import list_passes
    from diffc.cli.terminal import Terminal

    list_passes(Terminal().console)


@app.command("formats")
def formats_command() -> None:
    """List the quantization formats and the compute capabilities that have them."""
    from diffc.cli.tables import list_formats
    from diffc.cli.terminal import Terminal

    list_formats(Terminal().console)


@app.command("doctor")
def doctor_command() -> None:
    """Say what works on this machine, why the rest does not, and what fixes it."""
    from diffc.cli.tables import examined
    from diffc.cli.terminal import Terminal
    from diffc.commands.doctor import examine

    examined(examine(), Terminal().console)


@models_app.command("list")
def models_list() -> None:
    """List the embedded models, and the real ones whose configurations diffc has."""
    from diffc.cli.tables import list_models
    from diffc.cli.terminal import Terminal

    list_models(Terminal().console)


@models_app.command("make")
def models_make(
    name: Annotated[str, typer.Argument(help="A model of `diffc models list`.")],
    directory: Annotated[Path, typer.Argument(help="The folder to write.")],
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="A real model's backbone, in full size, with random weights."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of random weights.", min=0)] = 0,
) -> None:
    """Write an embedded model as a diffusers pipeline folder, or a real one's backbone with random weights."""
    from diffc.cli.terminal import Terminal
    from diffc.models.embedded.real import make

    place, ui = directory.expanduser().absolute(), Terminal()
    typer.echo(f"{name} is in {make(name, place, random_weights=random_weights, seed=seed, ui=ui)}")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"diffc {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point of `diffc`: exit code 0 ok, 1 the user can fix it, 2 usage, 3 outputs differ, 130 Ctrl-C."""
    code = run(sys.argv[1:])
    gc.freeze()  # what Python collects at its end are the nodes of graphs, one by one: 3 s for FLUX.1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    debug = "--debug" in arguments
    try:
        result: Any = app(arguments, standalone_mode=False)
        if result == _STOPPED:  # typer turns Ctrl-C into this code
            return _stopped()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        return _report(error, debug)


_STOPPED = 130


def _stopped() -> int:
    typer.echo("Stopped. Nothing was written.", err=True)
    return _STOPPED


# What the system says about a path that the user chose. A file that is missing is another matter: our bug.
_PLACES = {errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR}


def _report(error: Exception, debug: bool) -> int:
    """Print an error that the user can fix and return its code; anything else is our bug and goes on."""
    from typer.exceptions import TyperException

    from diffc.errors import DiffcError

    if isinstance(error, typer.Abort):
        return _stopped()
    if isinstance(error, TyperException):
        typer.echo(f"{error.format_message()}\nSee diffc --help.", err=True)
        return error.exit_code
    if debug:
        raise error
    if isinstance(error, OSError) and error.errno in _PLACES:
        typer.echo(f"error: {error.strerror}: {error.filename}\n  Fix: name another place", err=True)
        return 1
    if isinstance(error, DiffcError):
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    from passes.base import PassCheckError, PassError

    if isinstance(error, PassError):
        typer.echo(f"error: {error}", err=True)
        return 3 if isinstance(error, PassCheckError) else 1
    raise error


if __name__ == "__main__":
    main()
