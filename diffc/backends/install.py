"""The commands that install what is missing, for messages that say how to fix it.

diffc is on no package index, so a command names the libraries themselves, at the versions that diffc is tested with:
`pip install "diffc[rtx]"` would fail, or fetch a stranger's package.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

RTX_PROVIDER = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"
"""ONNX Runtime's TensorRT-RTX provider; this release of it holds TensorRT-RTX 1.7.1, as the extra `rtx` does."""
UPGRADE = "upgrade diffc: git pull in its checkout, then pip install ."
CUDA_TORCH = (
    "install the NVIDIA driver and a CUDA build of torch (on Windows the plain index has the CPU build; see the command"
    " of https://pytorch.org/get-started/locally)"
)


def requirements() -> list[Requirement]:
    """Everything that the installed diffc declares, that of extras with a marker; empty when it is not installed."""
    try:
        return [Requirement(text) for text in metadata.requires("diffc") or ()]
    except metadata.PackageNotFoundError:
        return []


def packages_of(extra: str) -> list[str]:
    """The packages of an extra with their versions, such as ["tensorrt-rtx==1.7.1.116"]."""
    return [
        f"{r.name}{r.specifier}"
        for r in requirements()
        if r.marker is not None and r.marker.evaluate({"extra": extra})
    ]


def install_command(*extras: str) -> str:
    """The pip command that installs the packages of these extras."""
    wanted = [f'"{package}"' for extra in extras for package in packages_of(extra)]
    return f"pip install {' '.join(wanted)}"
