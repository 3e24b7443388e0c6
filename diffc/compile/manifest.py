"""The manifest of a compile: enough to run the artifact, and to make it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.describe import described_engines, described_passes, described_values, described_versions
from diffc.artifact.model import remembered
from diffc.compile.plan import Plan
from diffc.models.sources.hub import pinned
from diffc.models.sources.loras import described_loras

if TYPE_CHECKING:
    from diffc.backends.tensorrt.build import EngineReport
    from diffc.compile.cached.noise import CacheNoise
    from diffc.compile.graphs import Graphs
    from diffc.compile.request import CompileRequest
    from diffc.quantize.checkpoint import Checkpoint
    from diffc.validate.reports import ShapeReport


def manifest(
    plan: Plan,
    graphs: Graphs,
    validation: Sequence[ShapeReport],
    engines: Sequence[EngineReport],
    noise: CacheNoise | None = None,
) -> dict[str, Any]:
    """The content of manifest.json without the files, which `diffc.artifact.folder.write_manifest` adds."""
    model = graphs.models["model.onnx"]
    return {
        **described_versions(),
        "model": {
            "name": plan.source.name,
            "family": plan.source.family.name,
            "bytes": plan.source.nbytes,
            "fingerprint": plan.source.fingerprint,
            **({} if plan.source.revision is None else {"revision": plan.source.revision}),
            **({} if not plan.source.loras else {"loras": described_loras(plan.source, plan.request.loras)}),
            **({} if plan.source.origin is None else {"object": dict(plan.source.origin)}),
            "config": dict(plan.source.config),
            **_interface(plan),
        },
        "request": described_request(plan),
        **_sampling(plan),
        "format": plan.format.name,
        "dtype": plan.dtype,
        "targets": dict(graphs.files),
        "opset": model.opset_import[0].version,
        **described_values(model),
        "profile": plan.profile.described(),
        "passes": described_passes(graphs.records),
        "validation": [report.described() for report in validation],
        "engines": described_engines(engines),
        **({} if graphs.lora is None else {"lora_slots": graphs.lora.described(plan.source)}),
        **({} if graphs.cache is None else {"cache": graphs.cache.manifest() | _noise(noise)}),
    }


def described_request(plan: Plan) -> dict[str, Any]:
    """The request as a manifest holds it: all that a compile is asked for, at the revision that was found."""
    return request_content(plan.request) | {"hub": pinned(plan.request.hub, plan.source).to_json()}


def request_content(request: CompileRequest) -> dict[str, Any]:
    """The request as plain values, but for places that change nothing of the result."""
    content = asdict(replace(request, output=Path(), force=False, dump=None, save_checkpoint=None))
    del content["output"], content["force"], content["dump"], content["save_checkpoint"]
    content |= {"model": remembered(request.model), "hub": request.hub.to_json()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in content.items()}


def described_checkpoint(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What of a calibration is more than scales: weights that training has changed, and several formats in one."""
    if checkpoint is None:
        return {}
    found: dict[str, Any] = {}
    if checkpoint.weights:
        found["trained_weights"] = len(checkpoint.weights)
    if "formats" in checkpoint.calibration:
        found["formats"] = list(checkpoint.calibration["formats"])
    return {"checkpoint": found} if found else {}


def _interface(plan: Plan) -> dict[str, Any]:
    """What a family that no file describes was made from."""
    interface = plan.source.family.interface
    return {} if interface is None else {"captured": interface.to_json()}


def _sampling(plan: Plan) -> dict[str, Any]:
    """The steps and the guidance of a calibration on prompts, as they were in the end."""
    if not plan.runs_pipeline:
        return {}
    sampling = plan.sampling
    return {"sampling": {"steps": sampling.steps, "guidance": sampling.guidance}}


def _noise(noise: CacheNoise | None) -> dict[str, Any]:
    return {} if noise is None else {"noise": noise.to_json()}
