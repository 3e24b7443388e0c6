"""What a manifest says in the same words for every compile: versions, values of a graph, passes, engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from diffc.version import VERSION

if TYPE_CHECKING:
    import onnx

    from diffc.artifact.folder import Artifact
    from diffc.backends.tensorrt.build import EngineReport
    from passes.pipeline import PassRecord

IMPORTED = "as imported"
"""The format of an artifact that was compiled from an ONNX file."""
NOT_COMPARED = "numbers not compared"
"""What the check of a pass says, with the reason, where it ran nothing."""

_LIBRARIES = (
    *("torch", "diffusers", "nvidia-modelopt", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy"),
    *("tensorrt-rtx", "tensorrt-cu13"),
)


def is_imported(artifact: Artifact) -> bool:
    """Whether the artifact was compiled from an ONNX file, and so has no torch model."""
    return bool(artifact.manifest["format"] == IMPORTED)


def described_versions() -> dict[str, Any]:
    """The entries of a manifest that name diffc's version and those of its libraries."""
    return {"diffc": VERSION, "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on; those that are not installed are left out."""
    known = {}
    for library in _LIBRARIES:
        try:
            known[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return known


def described_values(model: onnx.ModelProto) -> dict[str, Any]:
    """Inputs and outputs of a model: names, types and dimensions."""
    return {
        "inputs": [_value(v) for v in model.graph.input],
        "outputs": [_value(v) for v in model.graph.output],
    }


def _value(value: onnx.ValueInfoProto) -> Mapping[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type), "dims": dims}


def described_passes(records: Sequence[PassRecord]) -> list[dict[str, Any]]:
    """What each pass did, and how it was checked."""
    return [{"name": r.name, "changed": r.changed, "notes": list(r.notes), "check": r.check} for r in records]


def described_engines(engines: Sequence[EngineReport]) -> list[dict[str, Any]]:
    """The engines, by file."""
    return [
        {
            "file": f"engines/{e.path.name}",
            "target": e.target,
            "version": e.version,
            "sms": list(e.sms),
            "layers": e.layers,
            "seconds": e.seconds,
            **({} if e.weights is None else {"weights": e.weights.name}),
        }
        for e in engines
    ]
