"""The command line: each subcommand parses, calls one function, prints, and returns a code.

Heavy libraries are imported inside the commands, so that `diffc --help` is instant.
"""

from __future__ import annotations

import errno
import gc
import sys
from typing import Annotated, Any

import typer

from diffc.cli.bench import bench_command
from diffc.cli.cache import cache_app
from diffc.cli.compile import compile_command
from diffc.cli.doctor import doctor_command
from diffc.cli.formats import formats_command
from diffc.cli.generate import generate_command
from diffc.cli.import_ import import_command
from diffc.cli.models import models_app
from diffc.cli.opt import opt_command
from diffc.cli.package import package_command
from diffc.cli.passes import passes_command
from diffc.cli.validate import validate_command
from diffc.version import VERSION

app = typer.Typer(
    name="diffc",
    help="Compile diffusion backbones: diffusers + ModelOpt -> ONNX -> TensorRT, TensorRT-RTX, ONNX Runtime.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile_command)
app.command("validate")(validate_command)
app.command("generate")(generate_command)
app.command("bench")(bench_command)
app.command("package")(package_command)
app.command("import")(import_command)
app.command("opt")(opt_command)
app.command("passes")(passes_command)
app.command("formats")(formats_command)
app.command("doctor")(doctor_command)
app.add_typer(models_app, name="models")
app.add_typer(cache_app, name="cache")


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
    from diffc.terminal_text import show_traceback

    sys.excepthook = show_traceback
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
    from diffc.terminal_text import block, error_text, line

    if isinstance(error, typer.Abort):
        return _stopped()
    if isinstance(error, TyperException):
        typer.echo(f"{block(error.format_message())}\nSee diffc --help.", err=True)
        return error.exit_code
    if debug:
        raise error
    if isinstance(error, OSError) and error.errno in _PLACES:
        where = line(f"{error.strerror}: {error.filename}")
        typer.echo(f"error: {where}\n  Fix: name another place", err=True)
        return 1
    if isinstance(error, DiffcError):
        typer.echo(error_text(error), err=True)
        return error.exit_code
    from passes.base import PassCheckError, PassError

    if isinstance(error, PassError):
        typer.echo(error_text(error), err=True)
        return 3 if isinstance(error, PassCheckError) else 1
    raise error
