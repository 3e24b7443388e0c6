"""Starts the process of `worker.py`, talks to it, and ends it, whatever happens on either side."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

_POLL_SECONDS = 0.2  # between looks for Ctrl-C, which Windows does not deliver while a read blocks


@contextlib.contextmanager
def worker(log_file: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The worker process; it ends with the block."""
    root = str(Path(__file__).resolve().parents[3])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["PYTHONIOENCODING"] = "utf-8"
    # -P: a file of the user's folder called onnx.py must not be imported
    command = [sys.executable, "-P", "-m", "diffc.backends.tensorrt.worker"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log_file,
        env=environment,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            if process.stdin:  # closing it sends what a dead worker did not take, which fails
                with contextlib.suppress(OSError):
                    process.stdin.close()


def events(process: subprocess.Popen[str], message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The worker's events, in order, until it ends."""
    lines: queue.Queue[str | None] = queue.Queue()
    thread = threading.Thread(target=_pump, args=(process, json.dumps(message), lines), daemon=True)
    thread.start()
    while True:
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            return
        with contextlib.suppress(ValueError):  # a worker killed in the middle of a line
            yield json.loads(line)


def _pump(process: subprocess.Popen[str], message: str, lines: queue.Queue[str | None]) -> None:
    try:
        if process.stdin and process.stdout:
            # A worker that died at once has closed its end (OSError); its exit code will say why. Ctrl-C closes ours
            # (ValueError), under the writer as under the reader.
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(message + "\n")
                process.stdin.flush()
            with contextlib.suppress(ValueError):
                for line in process.stdout:
                    lines.put(line)
    finally:
        lines.put(None)
