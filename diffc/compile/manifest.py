"""What manifest.json says of a compile: enough to run the artifact, and to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffc
from diffc.compile.plan import Plan

if TYPE_CHECKING:
    import onnx

    from diffc.backends.tensorrt.build import EngineReport
    from diffc.compile.cached.noise import CacheNoise
    from diffc.compile.spine import Graphs
    from diffc.validate.reports import ShapeReport
    from passes.pipeline import PassRecord

LIBRARIES = (
    "torch",
    "diffusers",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "onnx-graphsurgeon",
    "polygraphy",
)


def manifest(
    plan: Plan,
    graphs: Graphs,
    validation: Sequence[ShapeReport],
    engines: Sequence[EngineReport],
    noise: CacheNoise | None = None,
) -> dict[str, Any]:
    """What manifest.json says beside the files: enough to run the artifact, and to make it again."""
    request = asdict(replace(plan.request, output=Path(), force=False, dump=None))
    del request["output"], request["force"], request["dump"]
    model = graphs.models["model.onnx"]
    return {
        "diffc": diffc.__version__,
        "versions": versions(),
        "model": {"name": plan.source.name, "family": plan.spec.name, "config": dict(plan.source.config)},
        "request": {k: str(v) if isinstance(v, Path) else v for k, v in request.items()},
        "format": plan.format.name,
        "dtype": plan.dtype,
        "targets": dict(graphs.files),
        "opset": model.opset_import[0].version,
        **described_values(model),
        "profile": asdict(plan.profile),
        "passes": described_passes(graphs.records),
        "validation": [
            {
                "model": v.model,
                "shape": asdict(v.shape),
                "arithmetic": v.arithmetic,
                "draw": v.draw,
                "floor": v.floor,
                "outputs": [asdict(r) for r in v.rows],
            }
            for v in validation
        ],
        "engines": described_engines(engines),
        **({} if graphs.cache is None else {"cache": graphs.cache.manifest() | _noise(noise)}),
    }


def _noise(noise: CacheNoise | None) -> dict[str, Any]:
    return {} if noise is None else {"noise": noise.to_json()}


def described_values(model: onnx.ModelProto) -> dict[str, Any]:
    """Inputs and outputs of a model: names, types and dimensions."""
    return {
        "inputs": [_value(v) for v in model.graph.input],
        "outputs": [_value(v) for v in model.graph.output],
    }


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


def _value(value: onnx.ValueInfoProto) -> Mapping[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    dims = [d.dim_param or d.dim_value for d in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type), "dims": dims}


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on; those that are not installed are left out."""
    known = {}
    for library in (*LIBRARIES, "tensorrt-rtx", "tensorrt-cu13"):
        try:
            known[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return known
