"""What to package, what came of it, and the parts of an artifact that every layout takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from diffc.artifact.folder import MANIFEST, Artifact, check_output
from diffc.errors import DiffcError, UsageError
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import AnyPath, Converted, as_path, as_path_or_none, as_text_or_none
from diffc.records import read_record
from passes.graph.onnx_reader import all_tensors

_ORT_TARGETS = ("ort", "ort-cuda", "ort-trt-rtx", "trt-rtx")
_KEPT = ("diffc", "versions", "model", "format", "dtype", "profile")


@dataclass(frozen=True)
class PackageRequest:
    """What to package: `artifact` into `output`, as `layout` wants it.

    `target` says whose model of the artifact is taken, by default what suits the layout best.
    Of layout optimum alone: `components` is a folder of `optimum-cli export onnx` to take everything but the backbone
    from; without it text encoders and VAE are exported from the pipeline folder (`pipeline`, or the one that was
    compiled) in `dtype`. `hub` says which files of the pipeline are read.
    """

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    output: Converted[AnyPath, Path] = Converted(as_path)
    layout: str = "optimum"
    components: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    pipeline: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    target: str | None = None
    dtype: str = "float16"
    skip_validation: bool = False
    force: bool = False
    hub: HubOptions = DEFAULT_HUB


@dataclass(frozen=True)
class Packaged:
    """The finished folder, and how it is loaded.

    `pipeline_class`: the class of optimum-onnx that loads it, empty for other layouts. `errors`: of each exported
    component against torch. `notes`: what whoever loads the folder has to know, a line each.
    """

    folder: Path
    how: str
    pipeline_class: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_place(request: PackageRequest) -> None:
    """Raise DiffcError where the output is the artifact, another artifact, or (without `force`) is there at all."""
    if request.output.resolve() == request.artifact.resolve():
        raise DiffcError(f"{request.output} is the artifact", fix="choose another -o")
    check_output(request.output, force=request.force)
    manifest = request.output / MANIFEST
    if manifest.is_file() and "package" not in read_record(manifest, fix="choose another -o"):
        raise DiffcError(f"{request.output} is an artifact, no package", fix="choose another -o")


def check_backbone_alone(request: PackageRequest) -> None:
    """Raise UsageError for an option about the rest of the pipeline, which the layout does not hold."""
    given = {
        "--components": request.components is not None,
        "--pipeline": request.pipeline is not None,
        "--dtype": request.dtype != PackageRequest.dtype,
        "--skip-validation": request.skip_validation,
    }
    if wrong := [name for name, is_given in given.items() if is_given]:
        raise UsageError(
            f"layout {request.layout} holds the backbone alone, and takes no {wrong[0]}",
            fix=f"leave out {wrong[0]}, or choose --layout optimum",
        )


def model_file(artifact: Artifact, target: str | None) -> str:
    """The artifact's .onnx file for `target`, or for the first target whose file ONNX Runtime runs."""
    files: Mapping[str, str] = artifact.manifest["targets"]
    found = [name for name in ([target] if target else _ORT_TARGETS) if name in files]
    if not found:
        known = ", ".join(files)
        raise DiffcError(
            f"{artifact.folder} has no model for {target or 'ONNX Runtime'}; it was compiled for {known}",
            fix=f"compile with --target {target or 'ort'}",
        )
    return files[found[0]]


def external_files(model: onnx.ModelProto) -> set[str]:
    """Names of the files that hold weights of the model."""
    held = (t for t in all_tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in held for entry in tensor.external_data if entry.key == "location"}


def described(artifact: Artifact, layout: str) -> dict[str, Any]:
    """What diffc says of every package in its manifest, so that --force replaces packages only."""
    kept = {key: artifact.manifest[key] for key in _KEPT if key in artifact.manifest}
    return {"package": layout, **kept}
