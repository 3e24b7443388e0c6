"""How `diffc doctor` finds out whether a target works here: Python code, run in a process of its own.

Native code can end its process without a word, so none of this runs in the user's. Code prints what works, or ends with
the reason as the last line of its output.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffc.backends.install import RTX_PROVIDER

DRIVER = 580
"""The oldest driver of CUDA 13, which TensorRT-RTX, torch and ONNX Runtime's GPU packages are built with."""


@dataclass(frozen=True)
class Probe:
    """The check of a target. `fix` helps where the code fails; "{install}" in it is the command of the target's extra.

    `package` is a module that the code needs beside the target's own, `install` the command that installs it.
    """

    code: str
    fix: str
    package: str = ""
    install: str = ""


_GPU = "install the NVIDIA driver, or run this on a machine with a GPU"

BUILD_RTX = Probe(
    """
import tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(0)
x = network.add_input("x", trt.float16, (4, 4))
network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
assert builder.build_serialized_network(network, config) is not None
print("tensorrt_rtx", trt.__version__, "builds engines")
""",
    _GPU,
)
BUILD_TENSORRT = Probe(
    """
import tensorrt as trt
trt.Builder(trt.Logger(trt.Logger.ERROR))
print("tensorrt", trt.__version__, "finds a GPU to build for")
""",
    _GPU,
)
NV_PLUGIN = Probe(
    """
import onnxruntime, onnxruntime_ep_nv_tensorrt_rtx as plugin
onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
devices = [d for d in onnxruntime.get_ep_devices() if d.ep_name == plugin.get_ep_name()]
assert devices, "the provider finds no RTX GPU (compute capability 8.6, 8.9, or 12.0 and newer)"
print(plugin.get_ep_name())
""",
    f"install the NVIDIA driver ({DRIVER} or newer)",
    package="onnxruntime_ep_nv_tensorrt_rtx",
    install=f"pip install {RTX_PROVIDER}",
)


def provider(name: str) -> Probe:
    """Whether ONNX Runtime has the execution provider of that name."""
    code = f"""
import sys, onnxruntime as o
has = o.get_available_providers()
"{name}" in has or sys.exit("ONNX Runtime " + o.__version__ + " has " + ", ".join(has))
print("ONNX Runtime " + o.__version__ + ", {name}")
"""
    return Probe(code, "pip uninstall -y onnxruntime; {install}")
