"""What is told of an error that no part of diffc foresaw: the system's, a library's, or a bug of ours.

Each is one message: what we were doing, what was said, what to try. The traceback goes to a file, for a report.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType

from diffc.artifact.describe import versions
from diffc.errors import DiffcError
from diffc.progress import stage_of
from diffc.terminal_text import shown
from diffc.version import VERSION

_OURS = ("diffc", "passes", "tools")
_QUOTED = 1000
"""Characters of what a library said: the first lines hold what it means."""


def of_system(error: OSError) -> DiffcError:
    """What the system said about a file or folder."""
    said = error.strerror or str(error) or type(error).__name__
    where = "" if error.filename is None else f": {error.filename}"
    return DiffcError(f"{_while(error)}{said}{where}", fix="check that place and its room, or name another")


def of_memory(error: MemoryError) -> DiffcError:
    """Memory that the system did not give."""
    said = str(error) or "no memory is left"
    return DiffcError(
        f"{_while(error)}{said}",
        fix="ask for a smaller shape, batch or number of prompts, or end other programs",
    )


def of_others(error: Exception, arguments: list[str]) -> DiffcError:
    """An error of a library, or of ours, with the file that its traceback was written to."""
    file = _written(error, arguments)
    kept = f"the traceback is in {file}" if file else "--debug shows the traceback"
    said = f"{type(error).__name__}: {str(error)[:_QUOTED]}"
    library = _library(error.__traceback__)
    if library:
        return DiffcError(
            f"{_while(error)}{library} said: {said}",
            fix=f"check the input that it speaks of; if that is right, report it with that file: {kept}",
        )
    return DiffcError(
        f"{_while(error)}diffc {VERSION} has a bug: {said}",
        fix=f"report it to where you got diffc, with the command and the input if you may share it; {kept}",
    )


def _while(error: BaseException) -> str:
    stage = stage_of(error)
    return f"{stage}: " if stage else ""


def _library(trace: TracebackType | None) -> str:
    """The library that was called by us when the error came up; empty when it came up in our own code."""
    called = ""
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _OURS:
            called = ""
        elif not called and package not in sys.stdlib_module_names:
            called = package
        trace = trace.tb_next
    return called


def _written(error: Exception, arguments: list[str]) -> Path | None:
    """A new file with the traceback, the command and the versions; None where none can be written."""
    known = "".join(f"{name} {version}\n" for name, version in versions().items())
    head = f"diffc {VERSION}, Python {platform.python_version()}, {platform.platform()}\n{known}"
    text = f"{head}\ndiffc {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix="diffc-error-",
            suffix=".txt",
            delete=False,
            encoding="utf-8",
            errors="backslashreplace",
        ) as file:
            file.write(shown(text, 1 << 20))
    except OSError:
        return None
    return Path(file.name)
