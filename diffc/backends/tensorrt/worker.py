"""The process that holds TensorRT: `python -m diffc.backends.tensorrt.worker`, see `process.py`.

A request comes as JSON on stdin; events leave as JSON lines on stdout: "progress", then "error", or "done"
and "inspected". It then waits until stdin ends, so that the parent can rename the file, and removes what is
left of it. What TensorRT itself prints goes to stderr, which is the log file. When nobody reads its events
any more, it gives up.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from diffc.backends.tensorrt.network import describe
from diffc.memory import peak_rss

Send = Callable[..., None]
# The parent has made the file. This process does not import `passes`, which has the helper for it.
_FLAGS = os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class Rejected(Exception):
    """The parser or the builder, named by `kind`, rejects the model."""

    def __init__(self, kind: str, faults: list[Any]):
        super().__init__(kind)
        self.kind, self.faults = kind, faults


def main() -> int:
    """Serve one request. Returns 0 when the answer, good or bad, was sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends this process
    events = _own_stdout()
    request = json.loads(sys.stdin.readline())

    def send(event: str, **fields: Any) -> None:
        events.write(json.dumps({"event": event, **fields}) + "\n")
        events.flush()

    partial = Path(request["partial"])
    try:
        build(request, send)
        sys.stdin.read()  # until the parent has renamed the file, or is gone
    except Rejected as error:
        send("error", kind=error.kind, faults=error.faults)
    finally:  # any other exception goes to the log, whose end the parent shows
        partial.unlink(missing_ok=True)
    return 0


def _own_stdout() -> TextIO:
    """Keep stdout for events and point file descriptor 1 at the log, where native code prints."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def build(request: Mapping[str, Any], send: Send) -> None:
    """Parse, build and write one engine, and send its report. Raises Rejected."""
    trt = importlib.import_module(request["module"])
    logger = _logger(trt)
    started = time.perf_counter()
    builder = trt.Builder(logger)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)  # holds the weights: must live until the engine is built
    _parse(parser, request["model"], send)
    layers = describe(network)
    config = _config(trt, builder, request)
    config.progress_monitor = _monitor(trt, send)
    partial = Path(request["partial"])
    digest, nbytes = _serialize(trt, builder, network, config, partial, send)
    if not nbytes:
        raise Rejected("builder", logger.errors)
    send(
        "done",
        sha256=digest,
        nbytes=nbytes,
        seconds=time.perf_counter() - started,
        peak_rss=peak_rss(),
        version=trt.__version__,
        layers=layers,
    )
    # After "done": whatever goes wrong in here, the engine is built.
    send("inspected", layers=_inspect(trt, logger, partial) if request["has_device"] else None)


def _parse(parser: Any, model: str, send: Send) -> None:
    send("progress", phase="Parsing ONNX", done=0, total=1)
    if not parser.parse_from_file(model):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise Rejected("parser", [_fault(e) for e in errors])
    send("progress", phase="Parsing ONNX", done=1, total=1)


def _fault(error: Any) -> dict[str, str]:
    name = error.node_name() or f"number {error.node()}"
    return {"code": error.code().name, "text": error.desc(), "node": name, "op": error.node_operator()}


def _config(trt: Any, builder: Any, request: Mapping[str, Any]) -> Any:
    config = builder.create_builder_config()
    # What the inspector tells depends on it. Measured with TensorRT-RTX: the engine is not a byte larger.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["sms"]:
        config.num_compute_capabilities = len(request["sms"])
        for index, sm in enumerate(request["sms"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["weight_streaming"]:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if request["strip_weights"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # The same weights come back, so all fusions are allowed.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    for ranges in request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in ranges.items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    return config


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]  # the module is known only now
        """Errors are kept for the answer; everything down to INFO goes to the log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if severity <= trt.ILogger.INFO:
                print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)

    return Logger()


def _monitor(trt: Any, send: Send) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is known only now
        """Forwards phases as events. A phase is known by its name; nested ones come between."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            del parent
            self.totals[phase] = steps
            self._forward(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            return self._forward(phase, step + 1)

        def phase_finish(self, phase: str) -> None:
            self._forward(phase, self.totals[phase])

        def _forward(self, phase: str, done: int) -> bool:
            try:
                send("progress", phase=phase, done=done, total=self.totals[phase])
            except OSError:  # the parent is gone: answering False cancels the build
                return False
            return True

    return Monitor()


def _serialize(
    trt: Any, builder: Any, network: Any, config: Any, partial: Path, send: Send
) -> tuple[str, int]:
    """Build, and write the engine as the builder streams it: memory for a second copy is not needed.

    Returns its SHA-256 and length in bytes, 0 where the builder gave up.
    """
    digest = hashlib.sha256()
    with os.fdopen(os.open(partial, _FLAGS), "wb") as file:

        class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the module is known only now
            """Writes and hashes what it is given."""

            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)
                self.total = 0

            def write(self, data: bytes) -> int:
                file.write(data)
                digest.update(data)
                self.total += len(data)
                send("progress", phase="Writing engine", done=self.total, total=self.total)
                return len(data)

        writer = Writer()
        done = builder.build_serialized_network_to_stream(network, config, writer)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), writer.total if done else 0


def _inspect(trt: Any, logger: Any, engine: Path) -> Any:
    """The inspector's account of the engine; None where no GPU here can load it."""
    loaded = trt.Runtime(logger).deserialize_cuda_engine(engine.read_bytes())
    if loaded is None:
        return None
    inspector = loaded.create_engine_inspector()
    return json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


if __name__ == "__main__":
    sys.exit(main())
