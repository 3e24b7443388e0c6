"""`diffc doctor`: what works on this machine, why the rest does not, and the command that fixes it.

Each check imports what a user would run, in a process of its own where native code could take this one down.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

REQUIRED = (
    *("onnx", "onnx-graphsurgeon", "numpy", "ml_dtypes", "torch", "diffusers", "transformers"),
    *("nvidia-modelopt", "onnxscript", "polygraphy", "safetensors", "accelerate"),
)
_INSTALL = 'pip install -c tools/constraints.txt ".[{}]"'
_TIMEOUT = 120


@dataclass(frozen=True)
class Finding:
    """One line of the report: `works` or why not, and what fixes it (empty when nothing is to do)."""

    what: str
    works: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every check, in the order in which the answers build on each other."""
    return [*_libraries(), _torch(), *_targets(), *_room()]


def _libraries() -> Iterator[Finding]:
    for name in REQUIRED:
        try:
            yield Finding(name, True, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, False, "is not installed", _INSTALL.format("cpu"))
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(both) > 1:
        yield Finding(
            "one ONNX Runtime",
            False,
            "onnxruntime and onnxruntime-gpu unpack into the same folder",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    code, text = _run(
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    )
    if code:
        return Finding("torch on a GPU", False, _last(text), _INSTALL.format("cpu"))
    if text.strip():
        return Finding("torch on a GPU", True, text.strip())
    return Finding(
        "torch on a GPU", False, "torch sees no CUDA device: calibration runs on the CPU, in float32"
    )


def _targets() -> Iterator[Finding]:
    checks: dict[str, Callable[[], Finding]] = {
        "trt-rtx": _trt_rtx,
        "tensorrt": _tensorrt,
        "ort": lambda: _provider("ort", "CPUExecutionProvider", "cpu"),
        "ort-cuda": lambda: _provider("ort-cuda", "CUDAExecutionProvider", "gpu"),
        "ort-trt-rtx": _plugin,
    }
    for name, check in checks.items():
        found = check()
        yield Finding(f"target {name}", found.works, found.detail, found.fix)


_BUILD = """
import tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(0)
x = network.add_input("x", trt.float16, (4, 4))
network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
assert builder.build_serialized_network(network, config) is not None
print(trt.__version__)
"""


def _trt_rtx() -> Finding:
    return _native("trt-rtx", "tensorrt_rtx", _BUILD, "builds engines", "rtx")


def _tensorrt() -> Finding:
    code = "import tensorrt as trt; trt.Builder(trt.Logger(trt.Logger.ERROR)); print(trt.__version__)"
    return _native("tensorrt", "tensorrt", code, "finds a GPU to build for", "trt")


def _native(what: str, module: str, code: str, works: str, extra: str) -> Finding:
    import importlib.util

    if importlib.util.find_spec(module) is None:
        return Finding(what, False, f"{module} is not installed", _INSTALL.format(extra))
    status, text = _run(code)
    if status:
        return Finding(
            what, False, _last(text), "install the NVIDIA driver, or run this on a machine with a GPU"
        )
    return Finding(what, True, f"{module} {text.strip()} {works}")


def _provider(what: str, provider: str, extra: str) -> Finding:
    status, text = _run("import onnxruntime as o; print(o.__version__, *o.get_available_providers())")
    if status:
        return Finding(what, False, "onnxruntime is not installed", _INSTALL.format(extra))
    version, *providers = text.split()
    if provider not in providers:
        fix = f"pip uninstall -y onnxruntime; {_INSTALL.format(extra)}"
        return Finding(what, False, f"ONNX Runtime {version} has {', '.join(providers)}", fix)
    return Finding(what, True, f"ONNX Runtime {version}, {provider}")


_REGISTER = """
import onnxruntime, onnxruntime_ep_nv_tensorrt_rtx as plugin
onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == plugin.get_ep_name()]
assert devices, "the provider finds no RTX GPU (compute capability 8.6, 8.9, or 12.0 and newer)"
print(plugin.get_ep_name())
"""


def _plugin() -> Finding:
    import importlib.util

    if importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None:
        why = "the provider's package is not installed; models for it compile all the same"
        return Finding("ort-trt-rtx", False, why, "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13")
    status, text = _run(_REGISTER)
    if status:
        return Finding("ort-trt-rtx", False, _last(text), "install the NVIDIA driver (570 or newer)")
    return Finding("ort-trt-rtx", True, text.strip())


def _room() -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available / 1e9
    yield Finding(
        "memory",
        free > 4,
        f"{free:.0f} GB free; validation takes 16 bytes a parameter",
        "close other programs",
    )
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Finding("disk", disk > 5, f"{disk:.0f} GB free here", "free some space")


def _run(code: str) -> tuple[int, str]:
    """Run `code` in a Python of its own: its exit status, and what it wrote."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {_TIMEOUT} s"
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr + done.stdout


def _last(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word (a crash of native code)"
