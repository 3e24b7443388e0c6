"""What diffc needs of other packages, read from its own metadata: which are pinned, and how those of an extra come."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement

from diffc.errors import DiffcError

COMPILE = "compile"
"""The extra of what compiles."""
_MODULES = {"PIL": "pillow", "yaml": "pyyaml", "modelopt": "nvidia-modelopt", "onnx_ir": "onnx-ir"}
"""Modules that are not called as their packages are."""


def requirements(extra: str = "") -> list[Requirement]:
    """What diffc always needs, or with `extra` what that brings beside it, other extras of diffc followed."""
    found = []
    for requirement in (Requirement(text) for text in metadata.requires("diffc") or ()):
        if requirement.marker is None:
            found += [] if extra else [requirement]
        elif extra and requirement.marker.evaluate({"extra": extra}):
            more = [r for name in requirement.extras for r in requirements(name)]
            found += more if requirement.name == "diffc" else [requirement]
    return found


def install_command(extra: str) -> str:
    """The command that installs the packages of an extra: diffc itself is on no index."""
    return "pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in requirements(extra))


def missing(module: str) -> DiffcError | None:
    """The error for a module that could not be imported, where an extra that compiles brings it; None elsewhere."""
    top = module.partition(".")[0]
    name = _MODULES.get(top, top.replace("_", "-"))
    if name not in {requirement.name for requirement in requirements(COMPILE)}:
        return None
    return DiffcError(
        f"this command needs {name}, and diffc was installed for running artifacts only",
        fix=f"install what compiles: {install_command(COMPILE)}",
    )
