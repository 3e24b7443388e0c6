"""The commands that install what is missing, for messages that say how to fix it.

diffc is on no package index, so a command names the libraries themselves, at the versions that diffc is tested with:
`pip install "diffc[rtx]"` would fail, or fetch a stranger's package.
"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from diffc.errors import DiffcError

RTX_PROVIDER = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"
"""ONNX Runtime's TensorRT-RTX provider; this release of it holds TensorRT-RTX 1.7.1, as the extra `rtx` does."""
UPGRADE = "upgrade diffc: git pull in its checkout, then pip install ."
CUDA_TORCH = (
    "install the NVIDIA driver and a CUDA build of torch (on Windows the plain index has the CPU build; see the command"
    " of https://pytorch.org/get-started/locally)"
)


COMPILE = "compile"
"""The extra of what compiles; without it, artifacts can be run."""
_MODULES = {"PIL": "pillow", "yaml": "pyyaml", "modelopt": "nvidia-modelopt"}
"""Modules that are not called as their packages are."""


def requirements(extra: str = "") -> list[Requirement]:
    """What the installed diffc always needs, or what `extra` brings beside it; empty when it is not installed."""
    try:
        declared = [Requirement(text) for text in metadata.requires("diffc") or ()]
    except metadata.PackageNotFoundError:
        return []
    if not extra:
        return [r for r in declared if r.marker is None]
    of_extra = [r for r in declared if r.marker is not None and r.marker.evaluate({"extra": extra})]
    return [r for r in of_extra if r.name != "diffc"]  # an extra of diffc that brings another one


def packages_of(extra: str) -> list[str]:
    """The packages of an extra with their versions, such as ["tensorrt-rtx==1.7.1.116"]."""
    return [f"{r.name}{r.specifier}" for r in requirements(extra)]


def install_command(*extras: str) -> str:
    """The pip command that installs the packages of these extras."""
    wanted = [f'"{package}"' for extra in extras for package in packages_of(extra)]
    return f"pip install {' '.join(wanted)}"


def missing(module: str) -> DiffcError | None:
    """The error for a module that could not be imported, where the extra that compiles brings it; None elsewhere."""
    top = module.partition(".")[0]
    name = _MODULES.get(top, top.replace("_", "-"))
    if name not in {requirement.name for requirement in requirements(COMPILE)}:
        return None
    return DiffcError(
        f"this command needs {name}, and diffc was installed for running artifacts only",
        fix=f"install what compiles: {install_command(COMPILE)}",
    )
