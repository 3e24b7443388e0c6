"""Where a command's words go: results to standard output, progress to standard error, records to a log file."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffc.errors import DiffcError
from diffc.progress import LOG, Logged, Reporter
from diffc.progress_bar import ProgressBar
from diffc.terminal_text import Screen, styled

_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
"""What keeps libraries, and the processes that a command starts, from talking between our lines."""


@dataclass(frozen=True)
class Verbosity:
    """How much is said: the options that every command has. `json` "-" is standard output."""

    quiet: bool = False
    verbose: bool = False
    log_file: Path | None = None
    json: str | None = None


class Terminal:
    """What a command prints with: `ui` for progress, `print` for results, `result` for --json."""

    def __init__(self, verbosity: Verbosity = Verbosity()):  # frozen
        self._json, self.quiet = verbosity.json, verbosity.quiet
        self.console = Screen(stderr=self._json == "-")
        self.ui: Reporter = Logged() if verbosity.quiet else ProgressBar()
        self._value: Any = None

    def print(self, *values: Any) -> None:
        """Print lines, tables and texts."""
        for value in values:
            self.console.print(value, soft_wrap=isinstance(value, str))

    def line(self, *parts: object | tuple[object, str]) -> None:
        """Print one line of parts, each as it is or (part, style); names of files are harmless in it."""
        self.console.print(styled(*parts), soft_wrap=True)

    def result(self, value: Any) -> None:
        """What --json writes."""
        self._value = value

    def write_json(self, error: Exception | None) -> None:
        """Write the result, or why there is none, where --json asks for it."""
        if self._json is None:
            return
        value = self._value
        if error is not None:
            what, fix = getattr(error, "what", str(error)), getattr(error, "fix", "")
            value = {"error": what, "fix": fix, "result": self._value}
        from msgspec.json import decode, encode

        # JSON has no infinite numbers, such as the PSNR of equal pictures: msgspec makes them null.
        text = json.dumps(decode(encode(value, enc_hook=str)), indent=2) + "\n"
        if self._json == "-":
            sys.stdout.write(text)
        else:
            from passes.files.atomic import write_text

            write_text(Path(self._json), text)


@contextmanager
def opened(verbosity: Verbosity) -> Iterator[Terminal]:
    """A terminal for the time of one command. Raises DiffcError where a file of it cannot be written."""
    for name in (verbosity.log_file, verbosity.json):
        if name not in (None, "-"):
            _check_place(Path(name))
    terminal = Terminal(verbosity)
    with ExitStack() as stack:
        stack.enter_context(_logging(verbosity))
        if not verbosity.verbose:
            stack.enter_context(_quiet_libraries("ignore" if verbosity.log_file is None else "default"))
        try:
            yield terminal
        except Exception as error:
            terminal.write_json(error)
            raise
        terminal.write_json(None)


def _check_place(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise DiffcError(f"the folder of {path} does not exist", fix="make it, or name another place")
    from diffc.output_files import check_output_file

    check_output_file(path)


@contextmanager
def _logging(verbosity: Verbosity) -> Iterator[None]:
    """Records to the log file, and with -v to standard error. Without either, libraries' records go nowhere."""
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if verbosity.log_file is not None:
        file = logging.FileHandler(verbosity.log_file, mode="w", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(file)
    if verbosity.verbose:
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        stream.addFilter(lambda record: record.name != LOG.name)  # the progress bar draws those
        handlers.append(stream)
    root, own = logging.getLogger(), [logging.getLogger(name) for name in ("diffc", "passes")]
    levels = [logger.level for logger in own]
    logging.captureWarnings(True)
    for handler in handlers:
        root.addHandler(handler)
    for logger in own:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(own, levels, strict=True):
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextmanager
def _quiet_libraries(warned: Literal["ignore", "default"]) -> Iterator[None]:
    """Libraries are told to be quiet before they are imported; their warnings are ignored, or logged by default."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(warned)
            yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
