"""Builds TensorRT and TensorRT-RTX engines: checks everything first, then builds in a process of its own.

The builder is native code that can crash, fill the memory or print anywhere; none of it may reach the user's
process or terminal. What it prints is `<engine>.log`; the parsed network is `<engine>.network.json`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffc.backends.onnx_graph import element_types, graph_inputs, read
from diffc.backends.profile import Profile
from diffc.backends.sm import check_sms
from diffc.backends.target import DEFAULT_ENGINE, EngineOptions, Target, find_target
from diffc.backends.tensorrt import errors as engine_errors
from diffc.backends.tensorrt.device import check_stripping, has_device
from diffc.backends.tensorrt.process import events, worker
from diffc.backends.tensorrt.profiles import check_profiles
from diffc.errors import DiffcError, UnsupportedError
from passes.files.atomic import drop, open_own, write_text
from passes.files.atomic import replace as replace_file

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a phase, its steps done, and its steps in all. Phases nest."""


@dataclass(frozen=True)
class EngineRequest:
    """What to build: `model` (.onnx, weights beside it) for `target` into the file `output`.

    `sms` names compute capabilities for trt-rtx; tensorrt builds for the GPU of the machine and takes none.
    """

    target: str
    model: Path
    output: Path
    sms: tuple[int, ...] = ()
    profiles: tuple[Profile, ...] = ()
    options: EngineOptions = DEFAULT_ENGINE


@dataclass(frozen=True)
class EngineReport:
    """What was built: file, SHA-256, bytes; seconds and peak memory (bytes) of the builder; for which SMs.

    `dumps` maps "network" (the parsed network, always) and "engine" (the inspector's account, only where a
    GPU can load the engine) to files of JSON. `layers` counts the layers of the parsed network. `weights` is the ONNX
    model that has the weights of an engine without its own.
    """

    target: str
    version: str
    path: Path
    sha256: str
    nbytes: int
    seconds: float
    peak_rss: int | None
    layers: int
    sms: tuple[int, ...]
    log: Path
    dumps: Mapping[str, Path]
    weights: Path | None = None

    def moved(self, folder: Path) -> EngineReport:
        """This report after its files were moved to `folder`."""
        dumps = {kind: folder / path.name for kind, path in self.dumps.items()}
        return replace(self, path=folder / self.path.name, log=folder / self.log.name, dumps=dumps)


def build_engine(request: EngineRequest, *, on_progress: OnProgress | None = None) -> EngineReport:
    """Build one engine; the file appears under its name only when it is complete.

    Raises DiffcError for a model, profile or compute capability that does not fit, for a missing wheel or
    GPU, for what the parser or builder rejects, and for a builder that crashed or was killed.
    """
    target = find_target(request.target)
    _check(target, request)
    partial = request.output.with_name(request.output.name + ".partial")
    log = request.output.with_suffix(".log")
    message = _message(target, request, partial)
    try:
        open_own(partial, new=True).close()  # the worker opens what is there, and no link
        with open_own(log, new=True) as log_file, worker(log_file) as process:
            answer = _listen(process, message, log, on_progress or _ignore)
            return _finish(request, answer, partial, log)
    except KeyboardInterrupt:
        log.unlink(missing_ok=True)
        raise
    finally:
        drop(partial)


def _check(target: Target, request: EngineRequest) -> None:
    if not target.is_engine:
        raise DiffcError(f"target {target.name!r} has no engine to build", fix="leave --sm out")
    if target.ahead_of_time and not request.sms:
        raise DiffcError(f"target {target.name!r} builds for named GPUs", fix="name them: --sm 89 --sm 120")
    if not target.ahead_of_time and request.sms:
        raise DiffcError(f"target {target.name!r} builds for this machine's GPU", fix="leave out --sm")
    if not request.output.parent.is_dir():
        raise DiffcError(f"no such folder: {request.output.parent}", fix="make it, or choose another output")
    model = read(request.model)
    check_sms(element_types(model), request.sms)
    check_profiles(graph_inputs(model), request.profiles)
    target.require()
    if request.options.strip_weights:
        check_stripping()
    if not target.ahead_of_time and not has_device():
        raise UnsupportedError(
            f"target {target.name!r} needs an NVIDIA GPU, and this machine has none",
            fix="build there, or use --target trt-rtx, which needs no GPU",
        )


def _message(target: Target, request: EngineRequest, partial: Path) -> dict[str, Any]:
    return {
        "module": target.module,
        "model": str(request.model.resolve()),
        "partial": str(partial.resolve()),
        "sms": sorted(set(request.sms)),
        "profiles": [p.inputs for p in request.profiles],
        **asdict(request.options),
        "has_device": has_device(),
    }


def _listen(
    process: subprocess.Popen[str], message: Mapping[str, Any], log: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """The worker's "done" event, with the inspector's account where there is one. Raises DiffcError for its errors."""
    model, answer = Path(message["model"]), None
    for event in events(process, message):
        if event["event"] == "progress":
            on_progress(event["phase"], event["done"], event["total"])
        elif event["event"] == "done":
            answer = event
        elif event["event"] == "inspected" and answer is not None:
            return answer | {"inspector": event["layers"]}
        elif event["kind"] == "parser":
            raise engine_errors.parser_error(model, event["faults"], log)
        else:
            raise engine_errors.builder_error(model, event["faults"], log)
    if answer is None:
        raise engine_errors.crash_error(model, process.wait(), log)
    return answer


def _finish(request: EngineRequest, answer: Mapping[str, Any], partial: Path, log: Path) -> EngineReport:
    accounts = {"network": answer["layers"], "engine": answer.get("inspector")}
    dumps = {}
    for kind, account in accounts.items():
        if account is not None:
            dumps[kind] = request.output.with_suffix(f".{kind}.json")
            write_text(dumps[kind], json.dumps(account, indent=1) + "\n")
    replace_file(partial, request.output)  # last: who finds the engine finds the rest
    return EngineReport(
        target=request.target,
        version=answer["version"],
        path=request.output,
        sha256=answer["sha256"],
        nbytes=answer["nbytes"],
        seconds=answer["seconds"],
        peak_rss=answer["peak_rss"],
        layers=len(answer["layers"]["layers"]),
        sms=tuple(sorted(set(request.sms))),
        log=log,
        dumps=dumps,
        weights=request.model if request.options.strip_weights else None,
    )


def _ignore(phase: str, done: int, total: int) -> None:
    del phase, done, total
