"""Compiles that many tests read, made once for all test processes; and the lanes of the suite.

A test that traces or compiles a backbone is marked `compiles`: by itself when it takes one of the fixtures below, by
`pytest.mark.compiles` when it does so on its own. Any other test that traces a backbone fails. The first lane leaves
out what is marked.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

# Before torch is imported. Of small matrices and several processes on few cores, threads spend nearly all of their
# time waiting for each other: an AWQ calibration of 0.3 seconds takes 20 beside other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a command prints is the same in every terminal that the tests are started from.
os.environ.pop("COLUMNS", None)

import onnx
import pytest
from filelock import FileLock

from diffc.artifact.folder import Artifact
from diffc.compile.spine import CompileRequest, CompileResult, Plan, check, compile_model
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import FORMATS
from diffc.quantize.options import QuantOptions
from diffc.validate.passes import NumericCheck
from tests import traces
from tests.lanes import Lanes
from tests.traces import Traces

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SMS = (86, 89, 120)
MHA = {"options": QuantOptions(mha=True)}
CELLS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FORMATS} | {
    "fp8+mha": ("fp8", MHA),
    "nvfp4+mha": ("nvfp4", MHA),
}
"""What compiles are named by in tests -> format and changes of the request."""
ALL_SMS = (("tiny-sd3", "none"), ("tiny-sd3", "fp8"))
"""Cells whose engines are built for every one of SMS. tools/pages/matrix.py builds every cell for each."""
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

    Test processes of one session (pytest -n) share `root`: who comes second takes what is there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._done: dict[Any, Cell] = {}

    def __call__(self, model: str, cell: str, **changed: Any) -> Cell:
        key = (model, cell, *sorted(changed.items()))
        if key not in self._done:
            digest = hashlib.sha256(repr(key).encode()).hexdigest()[:8]
            folder = self._root / f"{model}-{cell}-{digest}"
            request = small_request(model, cell, folder / "artifact", **changed)
            content = made_once(folder, "result.pickle", lambda: pickle.dumps(compile_model(request)))
            self._done[key] = Cell(request, pickle.loads(content))
        return self._done[key]


def made_once(folder: Path, name: str, make: Callable[[], bytes]) -> bytes:
    """What `make` gives, or what another test process of this session has stored under that name."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / name
    with FileLock(folder / "lock"):
        if not kept.exists():
            kept.write_bytes(make())
    return kept.read_bytes()


def small_request(model: str, cell: str, output: Path, **changed: Any) -> CompileRequest:
    """Two prompts, two steps, small images; where there is a builder, the oldest GPUs that the format exists on."""
    format, options = CELLS[cell]
    every = [sm for sm in SMS if sm >= FORMATS[format].min_sm] if HAS_RTX else []
    sms = tuple(every if (model, cell) in ALL_SMS else every[:1])
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all test processes of this session."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"


@pytest.fixture(scope="session")
def compiled(shared: Path) -> Cells:
    """The cells of this session, of all its test processes."""
    return Cells(shared / "compiled")


@pytest.fixture(scope="session")
def traced(shared: Path) -> onnx.ModelProto:
    """tiny-sd3 in float16 after the trace, the slow part of a compile without calibration."""

    def make() -> bytes:
        from diffc.frontend.trace import trace
        from diffc.models.sources.locate import locate

        return trace(locate("tiny-sd3"), dtype="float16", checkpoint=None).SerializeToString()

    return onnx.ModelProto.FromString(made_once(shared / "traced", "tiny-sd3.onnx", make))


@pytest.fixture(scope="session", autouse=True)
def remembered_traces(shared: Path, request: pytest.FixtureRequest) -> Iterator[Traces]:
    """Compiles of this session take a trace that another has made."""
    from diffc.compile import stages

    lanes = request.config.pluginmanager.get_plugin("lanes")
    assert isinstance(lanes, Lanes)
    with pytest.MonkeyPatch.context() as patch:
        remembered = Traces(stages.trace_backbone, shared / "traces", made_once, lanes.require_mark)
        patch.setattr(stages, "trace_backbone", remembered)
        yield remembered


@pytest.fixture(scope="session", autouse=True)
def remembered_outputs(shared: Path) -> Iterator[None]:
    """The pass checks of compiles of this session take the outputs of a graph that another has run."""
    with pytest.MonkeyPatch.context() as patch:
        outputs = traces.remembered_outputs(NumericCheck._outputs, shared / "outputs", made_once)
        patch.setattr(NumericCheck, "_outputs", outputs)
        yield


@pytest.fixture
def fresh_traces(remembered_traces: Traces) -> Iterator[None]:
    """For a test of how a trace is made: it takes none that another test has made."""
    remembered_traces.off = True
    yield
    remembered_traces.off = False


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lanes(), "lanes")


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection: millions of objects that live to the end."""
    gc.collect()
    gc.freeze()
