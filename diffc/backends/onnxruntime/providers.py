"""Which execution providers of ONNX Runtime work here."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from diffc.backends.install import CUDA_TORCH, RTX_PROVIDER
from diffc.backends.probes import DRIVER
from diffc.backends.target import Target
from diffc.errors import DiffcError

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
"""The package whose library adds NvTensorRTRTXExecutionProvider to ONNX Runtime."""


def is_plugin(target: Target) -> bool:
    """Whether the provider of a target is not built into ONNX Runtime: PLUGIN registers it."""
    return target.provider == "NvTensorRTRTXExecutionProvider"


def why_not(target: Target) -> tuple[str, str]:
    """Why the runtime target cannot be used here and what fixes it; empty when it can."""
    target.require()
    import onnxruntime as ort

    if is_plugin(target):
        try:
            plugin_devices()
        except DiffcError as error:
            return error.what, error.fix
        return "", ""
    if target.provider not in ort.get_available_providers():
        fix = f"pip uninstall -y onnxruntime; pip install {target.wheels}"
        return f"ONNX Runtime {ort.__version__} has no {target.provider}", fix
    if not target.on_cpu and not torch.cuda.is_available():
        return "torch sees no CUDA device", CUDA_TORCH
    return "", ""


def plugin_devices() -> list[Any]:
    """The GPUs of NvTensorRTRTXExecutionProvider, registered from its package. Raises DiffcError without one."""
    import onnxruntime as ort

    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise DiffcError(
            "the package of ONNX Runtime's TensorRT-RTX provider is not installed",
            fix=f"pip install {RTX_PROVIDER}",
        ) from error
    name = plugin.get_ep_name()
    try:
        if not any(d.ep_name == name for d in ort.get_ep_devices()):
            ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # ONNX Runtime has one unrelated exception class per status code
        raise DiffcError(
            f"{name} cannot be loaded: {error}", fix=f"install the NVIDIA driver ({DRIVER} or newer)"
        ) from error
    devices = [d for d in ort.get_ep_devices() if d.ep_name == name]
    if not devices:
        raise DiffcError(
            f"{name} finds no RTX GPU (compute capability 8.6, 8.9, or 12.0 and newer)",
            fix="take another target, such as ort",
        )
    return devices
