"""What a compile can be for, as data: targets, and the options of the engine builder.

Nothing heavy is imported here: the command line reads these tables before any work begins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffc import plugins
from diffc.backends import probes
from diffc.backends.probes import Probe
from diffc.errors import DiffcError, UnsupportedError, unknown_value

if TYPE_CHECKING:
    from passes.base import Pass


@dataclass(frozen=True)
class Target:
    """Everything about something to compile for, or to run what was compiled.

    Compiling: `module` builds or runs it, and the pip extra `extra` brings that module. `is_engine`: a builder makes
    engines of the model. `ahead_of_time`: for named compute capabilities, on a machine without a GPU. `refuses` are
    formats that it cannot take, with the reason; `emulates` those that it runs in other types than theirs, with how.

    Running: the module `opens` of diffc opens a session (see `diffc.backends.session.Runtime`), of the file of target
    `runs` where that is another target's. Of several that work here, the one with the smallest `rank` is taken.
    `on_cpu`: on the CPU and nowhere else. `records`: it can record the launches of a shape and replay them
    (cuda_graph). `provider` is ONNX Runtime's name of it, `wheels` the pinned packages that bring it, `prefix` what
    the provider's options begin with where it is given ranges of shapes.

    `probe` is the check of `diffc doctor`; `needed`: without this target nothing can be compiled. `passes` follow the
    canonical ones; None takes those that `passes.presets` has under the target's name.
    """

    name: str
    module: str
    extra: str
    opens: str
    rank: int
    is_engine: bool = False
    ahead_of_time: bool = False
    refuses: Mapping[str, str] = field(default_factory=dict)
    emulates: Mapping[str, str] = field(default_factory=dict)
    runs: str = ""
    on_cpu: bool = False
    records: bool = False
    provider: str = ""
    wheels: str = ""
    prefix: str = ""
    probe: Probe | None = None
    needed: bool = False
    passes: tuple[Pass, ...] | None = None

    @property
    def file_of(self) -> str:
        """The target of a compile whose file this one runs."""
        return self.runs or self.name

    @property
    def takes_ranges(self) -> bool:
        """Whether it runs sizes inside a profile only."""
        return self.is_engine or bool(self.prefix)

    def check_format(self, name: str) -> None:
        """Raise UnsupportedError when the target cannot take the format of that name."""
        if name in self.refuses:
            raise UnsupportedError(
                f"target {self.name!r} cannot take format {name!r}: {self.refuses[name]}",
                fix="choose another --format, or --target trt-rtx",
            )

    def require(self) -> None:
        """Raise DiffcError when the module is not installed."""
        if importlib.util.find_spec(self.module) is None:
            raise DiffcError(
                f"target {self.name!r} needs the Python module {self.module!r}, which is not installed",
                fix="`diffc doctor` names the command that installs it",
            )


# ONNX Runtime's own providers have no FP4 kernels and none of TensorRT's operators.
_AS_FP8 = {
    "nvfp4": "FP4 values stored as FP8, dynamic scales by a model-local function",
    "nvfp4_svdquant": "FP4 values stored as FP8, dynamic scales by a model-local function",
    "mxfp8": "dynamic scales by a model-local function",
}
_NO_MXFP8 = {
    "mxfp8": "its provider gives ONNX Runtime no operator for MXFP8 blocks (it registers FP4 and FP8)"
}

_TENSORRT, _ORT = "diffc.backends.tensorrt.open", "diffc.backends.onnxruntime.open"
_ROWS = (
    Target(
        "trt-rtx",
        "tensorrt_rtx",
        "rtx",
        _TENSORRT,
        rank=1,
        is_engine=True,
        ahead_of_time=True,
        records=True,
        probe=probes.BUILD_RTX,
    ),
    Target("tensorrt", "tensorrt", "trt", _TENSORRT, rank=2, is_engine=True, probe=probes.BUILD_TENSORRT),
    Target(
        "ort",
        "onnxruntime",
        "cpu",
        _ORT,
        rank=6,
        emulates=_AS_FP8,
        on_cpu=True,
        provider="CPUExecutionProvider",
        wheels="onnxruntime==1.31.1",
        probe=probes.provider("CPUExecutionProvider"),
        needed=True,
    ),
    Target(
        "ort-cuda",
        "onnxruntime",
        "gpu",
        _ORT,
        rank=5,
        emulates=_AS_FP8,
        records=True,
        provider="CUDAExecutionProvider",
        wheels="onnxruntime-gpu==1.31.1",
        probe=probes.provider("CUDAExecutionProvider"),
    ),
    Target(
        "ort-trt-rtx",
        "onnxruntime",
        "cpu",
        _ORT,
        rank=3,
        refuses=_NO_MXFP8,
        provider="NvTensorRTRTXExecutionProvider",
        prefix="nv",
        probe=probes.NV_PLUGIN,
    ),
    Target(
        "ort-tensorrt",
        "onnxruntime",
        "gpu",
        _ORT,
        rank=4,
        runs="tensorrt",
        provider="TensorrtExecutionProvider",
        wheels="onnxruntime-gpu==1.31.1 tensorrt-cu13==11.4.0.106",
        prefix="trt",
    ),
)
_OWN = {target.name: target for target in _ROWS}
_ALL = {**_OWN, **plugins.load("diffc.targets", Target, _OWN)}
TARGETS: Mapping[str, Target] = {name: target for name, target in _ALL.items() if not target.runs}
"""What a compile can be for."""
RUNTIMES: Mapping[str, Target] = dict(sorted(_ALL.items(), key=lambda item: item[1].rank))
"""What can run an artifact, fastest first."""


@dataclass(frozen=True)
class EngineOptions:
    """How the builder of TensorRT and TensorRT-RTX works; the defaults are its own.

    `optimization_level` is 0 (fast build) to 5. `weight_streaming` lets an engine run with a part of its weights on
    the GPU, the rest comes when it is needed. `strip_weights` leaves the weights out of the engine file: whoever
    loads it fills them in from model.onnx_data, so that an artifact holds them once. The builder needs a GPU for
    it (without a driver it fails inside: cudaErrorInsufficientDriver).
    """

    optimization_level: int | None = None
    weight_streaming: bool = False
    strip_weights: bool = False


DEFAULT_ENGINE = EngineOptions()


def find_target(name: str) -> Target:
    """The target of that name. Raises what `named_target` does."""
    return named_target("target", name, TARGETS)


def named_target(kind: str, name: str, known: Mapping[str, Target]) -> Target:
    """One of `known`, which are targets of a `kind` as a user calls them.

    Raises DiffcError that lists them, or that names the packages of a plugin which cannot be used.
    """
    if name in known:
        return known[name]
    raise plugins.unusable("diffc.targets", kind, name) or unknown_value(kind, name, known)
