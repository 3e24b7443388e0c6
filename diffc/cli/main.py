"""The command line: its commands, and what an error becomes.

A command's file parses, calls one function and prints. Heavy libraries are imported inside the commands, so that
`diffc --help` is instant.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Annotated, Any

import typer

from diffc.cli import (
    bench,
    compile,
    doctor,
    evaluate,
    formats,
    generate,
    import_,
    inspect,
    mix,
    opt,
    package,
    passes,
    relora,
    report,
    slim,
    sweep,
    train,
    validate,
)
from diffc.cli.cache import cache_app
from diffc.cli.checkpoint import checkpoint_app
from diffc.cli.command import Command, Group, shared_options
from diffc.cli.foreign_options import instead_of
from diffc.cli.models import models_app
from diffc.cli.sweep_options import SweepCommand
from diffc.plugins import broken, load, unusable
from diffc.version import VERSION

_HELP = {"help_option_names": ["-h", "--help"]}
_EPILOG = """\b
Exit codes: 0 done, 1 something to fix, 2 wrong usage, 3 outputs differ, 130 Ctrl-C.
More on a command: diffc COMMAND --help"""
app = typer.Typer(
    name="diffc",
    cls=Group,
    help="Compile diffusion backbones: diffusers + ModelOpt -> ONNX -> TensorRT, TensorRT-RTX, ONNX Runtime.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)
_ANYTHING = {"allow_extra_args": True, "ignore_unknown_options": True}


def _refusing(name: str) -> Callable[[], None]:
    """A command in the place of a plugin's that cannot be used: whatever it is given, it says so."""

    def command() -> None:
        raise unusable("diffc.commands", "command", name) or AssertionError(name)

    return command


_MAKE, _CHECK, _LISTS = "Make", "Check and use", "Look up"
for name, function, text, panel in (
    ("compile", compile.compile_command, compile.EXAMPLES, _MAKE),
    ("sweep", sweep.sweep_command, sweep.EXAMPLES, _MAKE),
    ("train", train.train_command, train.EXAMPLES, _MAKE),
    ("mix", mix.mix_command, mix.EXAMPLES, _MAKE),
    ("import", import_.import_command, import_.EXAMPLES, _MAKE),
    ("opt", opt.opt_command, opt.EXAMPLES, _MAKE),
    ("relora", relora.relora_command, relora.EXAMPLES, _MAKE),
    ("package", package.package_command, package.EXAMPLES, _MAKE),
    ("slim", slim.slim_command, slim.EXAMPLES, _MAKE),
    ("validate", validate.validate_command, validate.EXAMPLES, _CHECK),
    ("generate", generate.generate_command, generate.EXAMPLES, _CHECK),
    ("evaluate", evaluate.evaluate_command, evaluate.EXAMPLES, _CHECK),
    ("bench", bench.bench_command, bench.EXAMPLES, _CHECK),
    ("report", report.report_command, report.EXAMPLES, _CHECK),
    ("inspect", inspect.inspect_command, inspect.EXAMPLES, _CHECK),
    ("doctor", doctor.doctor_command, doctor.EXAMPLES, _CHECK),
    ("formats", formats.formats_command, formats.EXAMPLES, _LISTS),
    ("passes", passes.passes_command, passes.EXAMPLES, _LISTS),
):
    kind = SweepCommand if name == "sweep" else Command
    app.command(name, cls=kind, epilog=text, rich_help_panel=panel)(shared_options(function))
app.add_typer(models_app, name="models", rich_help_panel=_LISTS)
app.add_typer(cache_app, name="cache", rich_help_panel=_LISTS)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel=_MAKE)
_OWN = [*(command.name or "" for command in app.registered_commands), "models", "cache", "checkpoint"]
for name, added in load("diffc.commands", FunctionType, _OWN).items():
    app.command(name, cls=Command, rich_help_panel="From other packages")(shared_options(added))
for fault in broken("diffc.commands"):
    if fault.name not in _OWN:
        app.command(fault.name, hidden=True, context_settings=_ANYTHING)(_refusing(fault.name))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"diffc {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of `diffc`: exit code 0 ok, 1 the user can fix it, 2 usage, 3 outputs differ, 130 Ctrl-C."""
    from diffc.terminal_text import show_traceback

    sys.excepthook = show_traceback
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal of ASCII or Latin-1 shows what it lacks as \\u2713
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    gc.freeze()  # what Python collects at its end are the nodes of graphs, one by one: 3 s for FLUX.1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    debug = "--debug" in arguments
    try:
        result: Any = app(arguments, prog_name="diffc", standalone_mode=False)
        if result == _STOPPED:  # typer turns Ctrl-C into this code
            return _stopped()
        return result if isinstance(result, int) else 0
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        return _report(error, debug, arguments)


_STOPPED = 130


def _stopped() -> int:
    typer.echo("Stopped. Nothing unfinished was written.", err=True)
    return _STOPPED


def _report(error: Exception, debug: bool, arguments: list[str]) -> int:
    """Print an error as one message, and return its code; with `debug` it goes on, and its traceback is shown."""
    from typer.exceptions import TyperException

    from diffc.backends.install import missing
    from diffc.cli import failures
    from diffc.errors import DiffcError
    from diffc.terminal_text import block, error_text
    from passes.base import PassCheckError, PassError

    if isinstance(error, typer.Abort):
        return _stopped()
    if isinstance(error, TyperException):
        command = getattr(getattr(error, "ctx", None), "command_path", "diffc")
        instead = instead_of(getattr(error, "option_name", ""))
        typer.echo(f"{block(error.format_message())}{instead}\nSee {command} --help.", err=True)
        return error.exit_code
    if debug:
        raise error
    if isinstance(error, OSError):
        error = failures.of_system(error)
    elif isinstance(error, MemoryError):
        error = failures.of_memory(error)
    elif isinstance(error, ModuleNotFoundError):
        error = missing(error.name or "") or error
    if not isinstance(error, DiffcError | PassError):
        error = failures.of_others(error, arguments)
    typer.echo(error_text(error), err=True)
    return 3 if isinstance(error, PassCheckError) else getattr(error, "exit_code", 1)
