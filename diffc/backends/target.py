"""What a compile can be for, as data: targets, compute capabilities, profiles, and what each type needs.

Nothing heavy is imported here: the command line reads these tables before any work begins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from diffc.backends import probes
from diffc.backends.probes import Probe
from diffc.errors import DiffcError, UnsupportedError, unknown_value
from diffc.quantize.formats import FORMATS

KNOWN_SMS = (75, 80, 86, 89, 120, 121)
"""Compute capabilities that the TensorRT-RTX 1.7 builder has names for (its `ComputeCapability`)."""

# onnx.TensorProto element type -> what people call it, and the oldest SM whose kernels have it, None where no
# builder reads it. Measured by tools/compat and held against its compat.json by a test: "Cannot compile for
# target(s) sm86, because the model contains HW-specific datatypes: fp8_e4m3". The numbers are onnx.TensorProto's,
# so that reading this table does not import onnx.
_TYPE_MIN_SM: Mapping[int, tuple[str, int | None]] = {
    16: ("BFLOAT16", 80),
    22: ("INT4", 80),
    17: ("FP8 (FLOAT8E4M3FN)", 89),
    24: ("MXFP8 scales (FLOAT8E8M0)", 89),
    23: ("FP4 (FLOAT4E2M1)", 120),
    4: ("UINT16", None),
    5: ("INT16", None),
    12: ("UINT32", None),
    13: ("UINT64", None),
    18: ("FLOAT8E4M3FNUZ", None),
    19: ("FLOAT8E5M2", None),
    20: ("FLOAT8E5M2FNUZ", None),
    21: ("UINT4", None),
    25: ("UINT2", None),
    26: ("INT2", None),
}
_ANY = (KNOWN_SMS[0], "")


@dataclass(frozen=True)
class Target:
    """Everything about something to compile for, or to run what was compiled; its passes are in `passes.presets`.

    Compiling: `module` builds or runs it, and the pip extra `extra` brings that module. `is_engine`: a builder makes
    engines of the model. `ahead_of_time`: for named compute capabilities, on a machine without a GPU. `refuses` are
    formats that it cannot take, with the reason; `emulates` those that it runs in other types than theirs, with how.

    Running: the module `opens` of diffc opens a session (see `diffc.backends.session.Runtime`), of the file of target
    `runs` where that is another target's. Of several that work here, the one with the smallest `rank` is taken.
    `on_cpu`: on the CPU and nowhere else. `records`: it can record the launches of a shape and replay them
    (cuda_graph). `provider` is ONNX Runtime's name of it, `wheels` the packages that bring the provider, `prefix` what
    the provider's options begin with where it is given ranges of shapes.

    `probe` is the check of `diffc doctor`; `needed`: without this target nothing can be compiled.
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
        wheels="onnxruntime",
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
        wheels="onnxruntime-gpu",
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
        wheels="onnxruntime-gpu tensorrt-cu13",
        prefix="trt",
    ),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ROWS if not target.runs}
"""What a compile can be for."""
RUNTIMES: Mapping[str, Target] = {target.name: target for target in sorted(_ROWS, key=lambda t: t.rank)}
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
    """The target of that name. Raises DiffcError that lists the known ones."""
    if name not in TARGETS:
        raise unknown_value("target", name, TARGETS)
    return TARGETS[name]


def parse_sm(text: str) -> int:
    """A compute capability from "89", "sm89" or "8.9". Raises DiffcError that lists the known ones."""
    digits = text.strip().lower().removeprefix("sm").removeprefix("_").replace(".", "")
    if not digits.isascii() or not digits.isdigit() or int(digits) not in KNOWN_SMS:
        raise unknown_value("compute capability", text, [str(sm) for sm in KNOWN_SMS])
    return int(digits)


def required_sm(element_types: Iterable[int]) -> tuple[int, str]:
    """The oldest compute capability that has all these onnx.TensorProto types, and the type that decides it.

    The name is empty when every known compute capability has them. Types that none has are left out.
    """
    rows = [_TYPE_MIN_SM.get(int(t), ("", _ANY[0])) for t in element_types]
    return max(((sm, name) for name, sm in rows if sm is not None), default=_ANY)


def check_sms(model_types: Collection[int], sms: Collection[int]) -> None:
    """Raise UnsupportedError when one of `sms` lacks a type of the model, before anything is built."""
    rows = [_TYPE_MIN_SM.get(int(t), ("", _ANY[0])) for t in model_types]
    unread = sorted(name for name, sm in rows if sm is None)
    if sms and unread:
        raise UnsupportedError(
            f"the model holds {', '.join(unread)}, which the compiler cannot read",
            fix="quantize to INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1, and cast other integers to INT32",
        )
    minimum, name = required_sm(model_types)
    _check(f"the model holds {name}", minimum, sms)


def check_format_sms(format_name: str, min_sm: int, sms: Iterable[int]) -> None:
    """Raise UnsupportedError when one of `sms` cannot run a format that exists from `min_sm` on."""
    _check(f"format {format_name!r} was asked for", min_sm, sms)


def _check(why: str, minimum: int, sms: Iterable[int]) -> None:
    old = sorted(sm for sm in set(sms) if sm < minimum)
    if not old:
        return
    names = ", ".join(f"SM{sm}" for sm in old)
    fit = ", ".join(f.name for f in FORMATS.values() if f.min_sm <= old[0])
    raise UnsupportedError(
        f"{why}, which needs SM{minimum} or newer; too old: {names}. Formats that run there: {fit}",
        fix=f"leave out {' '.join(f'--sm {sm}' for sm in old)}, or choose another type or --format",
    )
