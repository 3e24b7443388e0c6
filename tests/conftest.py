"""Compiles that many tests read: each cell of model, format and type is made once for all test processes."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before torch is imported. Of small matrices and several processes on few cores, threads spend nearly all of their
# time waiting for each other: an AWQ calibration of 0.3 seconds takes 20 beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import onnx
import pytest
from filelock import FileLock

from diffc.artifact.folder import Artifact
from diffc.compile.spine import CompileRequest, CompileResult, Plan, check, compile_model
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions

# pytest would keep every line that torch's tracer thinks.
logging.getLogger("torch.__trace").propagate = False

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SMS = (86, 89, 120)
MHA = {"options": QuantOptions(mha=True)}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FORMATS} | {
    "fp8+mha": ("fp8", MHA),
    "nvfp4+mha": ("nvfp4", MHA),
}
"""What compiles are named by in tests -> format and changes of the request."""
PROMPTS = ("a red fox asleep in fresh snow", "a wooden sign that reads OPEN")


@dataclass(frozen=True)
class Cell:
    """One compile: the request, what came back, and what is on disk."""

    request: CompileRequest
    result: CompileResult

    @property
    def folder(self) -> Path:
        return self.request.output

    @cached_property
    def plan(self) -> Plan:
        return check(replace(self.request, force=True))

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The written model with all its weights in memory."""
        return onnx.load(self.folder / "model.onnx")

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        return None if self.request.format == "none" else Checkpoint.load(self.folder / "checkpoint")

    @cached_property
    def artifact(self) -> Artifact:
        return Artifact.load(self.folder)


class Cells:
    """`cells(model, cell, **changes of the request)`: the finished cell, compiled on its first use.

    Two processes compile, since tracing keeps one core busy; `start` queues a cell without waiting for it.
    Test processes of one session (pytest -n) share `root`: who comes second takes what is there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        self._started: dict[Any, tuple[CompileRequest, Future[CompileResult]]] = {}
        self._done: dict[Any, Cell] = {}

    def start(self, model: str, cell: str, **changed: Any) -> Any:
        key = (model, cell, *sorted(changed.items()))
        if key not in self._started:
            digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
            output = self._root / f"{model}-{cell}-{digest}" / "artifact"
            request = small_request(model, cell, output, **changed)
            self._started[key] = request, self._pool.submit(compiled_once, request)
        return key

    def __call__(self, model: str, cell: str, **changed: Any) -> Cell:
        key = self.start(model, cell, **changed)
        if key not in self._done:
            request, future = self._started[key]
            self._done[key] = Cell(request, future.result())
        return self._done[key]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def compiled_once(request: CompileRequest) -> CompileResult:
    """Compile, or take what another test process has compiled."""
    folder = request.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "result.pickle"
    with FileLock(folder / "lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(compile_model(request)))
    result: CompileResult = pickle.loads(kept.read_bytes())
    return result


def small_request(model: str, cell: str, output: Path, **changed: Any) -> CompileRequest:
    """Two prompts, two steps, small images; all GPUs that the format exists on where there is a builder."""
    format, options = CELLS[cell]
    sms = tuple(sm for sm in SMS if sm >= FORMATS[format].min_sm) if HAS_RTX else ()
    request = CompileRequest(
        model,
        output,
        format,
        ("trt-rtx", "ort") if HAS_RTX else ("ort",),
        sms,
        prompts=PROMPTS,
        steps=2,
        image_size=64,
    )
    return replace(request, **options, **changed)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cells]:
    """The cells of this session, of all its test processes."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    cells = Cells(root / "compiled")
    yield cells
    cells.close()
