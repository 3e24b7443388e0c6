"""`diffc compile model.onnx`: an existing ONNX file through the same stages, from the import on.

The file says what is quantized and in which type it computes, so nothing is calibrated and no torch model stands
beside it: every pass is checked in numbers against the graph before it, as far as ONNX Runtime can run that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import onnx

from diffc.artifact.describe import (
    IMPORTED,
    described_engines,
    described_passes,
    described_values,
    described_versions,
)
from diffc.artifact.folder import Artifact, check_output, file_sha256, staging, write_manifest
from diffc.artifact.records import save_passes
from diffc.backends.onnx_graph import compute_type, element_types
from diffc.backends.profile import Profile
from diffc.backends.sm import check_sms
from diffc.backends.target import Target, find_target
from diffc.compile.engines import build_engines
from diffc.compile.graphs import Graphs, legalize, run_passes, write
from diffc.compile.import_check import ImportCheck
from diffc.compile.import_onnx import canonical, read
from diffc.compile.import_profile import (
    check_profile,
    given_sizes,
    held_to_file,
    profile_of,
    shape_profile,
    trial_sizes,
)
from diffc.compile.manifest import request_content
from diffc.compile.plan import check_engine, check_targets
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest, CompileResult, request_key
from diffc.errors import DiffcError, UnsupportedError
from diffc.frontend.onnx_family import KnownInterface, read_interface
from diffc.frontend.onnx_file import CONTRIB
from diffc.progress import Reporter
from diffc.validate.fitting_sizes import FittingSizes
from diffc.validate.float32 import emulated
from diffc.validate.trial_inputs import named_dimensions
from passes.pipeline import PassRecord

_FROM_FILE = {
    "format": "--format",
    "dtype": "--dtype",
    "from_checkpoint": "--from-checkpoint",
    "save_checkpoint": "--save-checkpoint",
    "options": "the options of quantization",
    "prompts": "--prompts-file",
    "calib_size": "--calib-size",
    "component_dtypes": "--component-dtype",
    "image_size": "--image-size",
    "height": "--height",
    "width": "--width",
    "steps": "--steps",
    "guidance": "--guidance",
    "negative_prompt": "--negative-prompt",
    "cache_plan": "--cache-plan",
    "hub": "options of the Hugging Face hub and variants",
}


def compile_onnx(request: CompileRequest, ui: Reporter) -> CompileResult:
    """Import `request.model`, an .onnx file, and compile it for the targets asked for.

    Raises DiffcError, PassError and MismatchError as `diffc.compile.spine.compile_model` does.
    """
    ui = Recorded(ui)
    path = Path(request.model)
    targets = check_request(request)
    file = read(path, ui)
    _check_domains(file.model, path, targets)
    profile_of(
        file.model, request.profile, targets, read_interface(file.model, path)
    )  # says early what is missing
    check = ImportCheck(trial_sizes(given_sizes(file.model, request.profile)), seed=request.seed)
    before = named_dimensions(file.model)
    imported = canonical(file, path, check, ui=ui)
    request = replace(request, profile=held_to_file(request.profile, before, file.model))
    interface = read_interface(file.model, path)
    if interface is not None:
        ui.note(f"its inputs are those of {interface.family}: diffc.load, generate and bench run it")
    profile = profile_of(file.model, request.profile, targets, interface)
    fitting = FittingSizes(emulated(imported.model))
    check_profile(given_sizes(file.model, request.profile), lambda s: fitting.reason(s) or check.reason(s))
    _check_types(imported.model, request.sms)
    key = request_key(request, [path])
    with staging(request.output, force=request.force, key=key) as folder:
        graphs = _legalized(imported.model, targets, check, request, ui)
        hashes = write(graphs, folder, ui)
        engines = build_engines(graphs, targets, request.sms, request.engine, profile, folder, ui)
        records = [*imported.records, *graphs.records]
        made = read_interface(file.model, path, graphs.models["model.onnx"])
        content = {
            **_manifest(request, graphs, profile),
            **_backbone(made, request, file.model),
            "passes": described_passes(records),
            "engines": described_engines(engines),
        }
        save_passes(records, folder)
        ui.save(folder, engines, request_content(request))
        written = write_manifest(folder, content, hashes)
    artifact = Artifact(request.output, written)
    return CompileResult(artifact, records, (), [e.moved(request.output / "engines") for e in engines])


def check_request(request: CompileRequest) -> tuple[Target, ...]:
    """The targets. Raises DiffcError for options that an ONNX file leaves no room for, before any work."""
    if request.loras or request.lora_slots:
        raise DiffcError(
            f"{request.model} is an ONNX file, and --lora and --lora-slots are for diffusers models",
            fix="fuse the LoRA by a pass: --passes 'fuse-lora{file=FILE.safetensors,weight=0.8}'",
        )
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


def _check_domains(model: onnx.ModelProto, path: Path, targets: Sequence[Target]) -> None:
    """Raise UnsupportedError when an engine is asked for, of a graph with operators that ONNX Runtime alone has."""
    names = [target.name for target in targets if target.is_engine]
    own = {(f.domain, f.name) for f in model.functions}
    nodes = [n for n in model.graph.node if n.domain == CONTRIB and (n.domain, n.op_type) not in own]
    foreign = {n.op_type: n.name for n in nodes if not onnx.defs.has(n.op_type)}
    if names and foreign:
        listed = ", ".join(f"{CONTRIB}::{op} (node {name!r})" for op, name in list(foreign.items())[:5])
        raise UnsupportedError(
            f"{path} has operators of ONNX Runtime that {' and '.join(names)} lacks: {listed}",
            fix="export the model without ONNX Runtime's fusions, or compile it for --target ort or ort-cuda",
        )


def _legalized(
    model: onnx.ModelProto,
    targets: Sequence[Target],
    check: ImportCheck,
    request: CompileRequest,
    ui: Reporter,
) -> Graphs:
    records: Sequence[PassRecord] = ()
    if request.own_passes:
        result = run_passes(request.own_passes, model, "run the passes of --passes", check, request.dump, ui)
        model, records = result.model, result.records
    graphs = legalize(model, targets, check, request.dump, ui)
    return replace(graphs, records=[*records, *graphs.records])


def _backbone(
    interface: KnownInterface | None, request: CompileRequest, model: onnx.ModelProto
) -> dict[str, Any]:
    """What the manifest says of a file whose interface is a family's, so that diffusers' pipelines can run it."""
    if interface is None:
        return {}
    path = Path(request.model)
    described = {"family": interface.family.name, "config": dict(interface.config)}
    return {
        "model": {"name": path.name, "sha256": file_sha256(path), **described},
        "interface": interface.to_json(),
        "profile": shape_profile(interface, model, request.profile).described(),
    }


def _manifest(request: CompileRequest, graphs: Graphs, profile: Sequence[Profile]) -> dict[str, Any]:
    path = Path(request.model)
    model = graphs.models["model.onnx"]
    return {
        **described_versions(),
        "model": {"name": path.name, "sha256": file_sha256(path)},
        "format": IMPORTED,
        "dtype": compute_type(model),
        "targets": dict(graphs.files),
        "opset": model.opset_import[0].version,
        **described_values(model),
        "profile": [asdict(p) for p in profile],
        "validation": [],
    }
