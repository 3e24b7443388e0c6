"""`diffc compile model.onnx`: an existing ONNX file through the same stages, from the import on.

The file says what is quantized and in which type it computes, so nothing is calibrated and no torch model stands
beside it: every pass is checked in numbers against the graph before it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffc.artifact.describe import (
    IMPORTED,
    described_engines,
    described_passes,
    described_values,
    described_versions,
)
from diffc.artifact.folder import Artifact, check_output, file_sha256, staging, write_manifest
from diffc.backends.onnx_graph import element_types
from diffc.backends.profile import Profile
from diffc.backends.sm import check_sms
from diffc.backends.target import Target, find_target
from diffc.compile.engines import build_engines
from diffc.compile.graphs import Graphs, legalize, run_passes, write
from diffc.compile.import_onnx import import_result
from diffc.compile.plan import check_engine, check_targets
from diffc.compile.request import CompileRequest, CompileResult, request_key
from diffc.errors import DiffcError
from diffc.models.profiles import parse_sizes
from diffc.progress import Reporter
from diffc.validate.passes import NumericCheck, random_feeds
from passes.pipeline import PassRecord

if TYPE_CHECKING:
    import onnx

_FROM_FILE = {
    "format": "--format",
    "dtype": "--dtype",
    "from_checkpoint": "--from-checkpoint",
    "options": "the options of quantization",
    "prompts": "--prompts-file",
    "calib_size": "--calib-size",
    "component_dtypes": "--component-dtype",
    "image_size": "--image-size",
    "cache_plan": "--cache-plan",
}


def compile_onnx(request: CompileRequest, ui: Reporter) -> CompileResult:
    """Import `request.model`, an .onnx file, and compile it for the targets asked for.

    Raises DiffcError, PassError and MismatchError as `diffc.compile.spine.compile_model` does.
    """
    path = Path(request.model)
    targets = check_request(request)
    imported = import_result(path, ui=ui)
    _check_types(imported.model, request.sms)
    profile = profile_of(imported.model, request.profile, targets)
    key = request_key(request, [path])
    with staging(request.output, force=request.force, key=key) as folder:
        graphs = _legalized(imported.model, targets, request, ui)
        hashes = write(graphs, folder, ui)
        engines = build_engines(graphs, targets, request.sms, request.engine, profile, folder, ui)
        records = [*imported.records, *graphs.records]
        content = {
            **_manifest(request, graphs, profile),
            "passes": described_passes(records),
            "engines": described_engines(engines),
        }
        written = write_manifest(folder, content, hashes)
    artifact = Artifact(request.output, written)
    return CompileResult(artifact, records, (), [e.moved(request.output / "engines") for e in engines])


def check_request(request: CompileRequest) -> tuple[Target, ...]:
    """The targets. Raises DiffcError for options that an ONNX file leaves no room for, before any work."""
    default = {field.name: field.default for field in fields(CompileRequest)}
    given = [option for name, option in _FROM_FILE.items() if getattr(request, name) != default[name]]
    if given:
        raise DiffcError(
            f"{request.model} is compiled as it is quantized, and {', '.join(given)} would change that",
            fix="leave it out, or compile the diffusers model instead of the ONNX file",
        )
    targets = tuple(find_target(name) for name in dict.fromkeys(request.targets))
    _ = request.own_passes  # raises PassError for an unknown one
    check_targets(targets, request.sms)
    check_engine(targets, request.engine)
    check_output(request.output, force=request.force)
    return targets


def _check_types(model: onnx.ModelProto, sms: Sequence[int]) -> None:
    check_sms(element_types(model), tuple(sms))


def profile_of(model: onnx.ModelProto, text: str, targets: Sequence[Target]) -> tuple[Profile, ...]:
    """The engine's shapes from `--profile dim=min:opt:max,...`, by the names of the file's dynamic dimensions.

    Empty when no dimension is dynamic or no target builds an engine. Raises DiffcError that lists what is
    missing or unknown.
    """
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    }
    known = list(dict.fromkeys(d for dims in shapes.values() for d in dims if isinstance(d, str)))
    sizes = parse_sizes(text, known)
    if not known or not any(target.is_engine for target in targets):
        return ()
    if missing := [name for name in known if name not in sizes]:
        raise DiffcError(
            f"the file has dynamic dimensions without a range: {', '.join(missing)}",
            fix=f"give --profile {shlex.quote(','.join(f'{name}=min:opt:max' for name in missing))}",
        )
    bounds = [{name: size[index] for name, size in sizes.items()} for index in range(3)]
    return (Profile.of_dims(shapes, *bounds),)


def _legalized(
    model: onnx.ModelProto, targets: Sequence[Target], request: CompileRequest, ui: Reporter
) -> Graphs:
    feeds = random_feeds(model, seed=request.seed)
    numbers, own = NumericCheck(lambda: feeds), request.own_passes
    records: Sequence[PassRecord] = ()
    if own:
        result = run_passes(own, model, "run the passes of --passes", numbers, request.dump, ui)
        model, records = result.model, result.records
    graphs = legalize(model, targets, numbers, request.dump, ui)
    return replace(graphs, records=[*records, *graphs.records])


def _manifest(request: CompileRequest, graphs: Graphs, profile: Sequence[Profile]) -> dict[str, Any]:
    path = Path(request.model)
    model = graphs.models["model.onnx"]
    return {
        **described_versions(),
        "model": {"name": path.name, "sha256": file_sha256(path)},
        "format": IMPORTED,
        "targets": dict(graphs.files),
        "opset": model.opset_import[0].version,
        **described_values(model),
        "profile": [asdict(p) for p in profile],
        "validation": [],
    }
