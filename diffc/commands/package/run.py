"""`diffc package`: an artifact in the layout of another program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from diffc.artifact.folder import Artifact, staging
from diffc.commands.package import comfyui, optimum, triton
from diffc.commands.package.request import Packaged, PackageRequest, check_place
from diffc.errors import unknown_value
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter

Layout = Callable[[Artifact, PackageRequest], Callable[[Path, Reporter], Packaged]]
"""Checks that the artifact fits, and returns what writes the package to a folder."""
LAYOUTS: Mapping[str, Layout] = {
    "optimum": optimum.prepare,
    "triton": triton.prepare,
    "comfyui": comfyui.prepare,
}


def package(request: PackageRequest, ui: Reporter | None = None) -> Packaged:
    """Write the folder. Raises DiffcError for what the user can fix, MismatchError for a component that differs."""
    ui = ui or default_reporter()
    if request.layout not in LAYOUTS:
        raise unknown_value("layout", request.layout, LAYOUTS)
    check_place(request)
    artifact = Artifact.load(request.artifact)
    artifact.verify()
    write = LAYOUTS[request.layout](artifact, request)
    with staging(request.output, force=request.force) as folder:
        return write(folder, ui)
