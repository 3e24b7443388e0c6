"""The spine of a compile: one call per stage, in the order in which data flows.

This file, `plan.py`, `quantize.py`, `stages.py` and `keys.py` alone know what a Plan holds; what they call is given
what it uses by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from diffc.artifact.folder import Artifact, file_names, staging, write_manifest
from diffc.artifact.records import save_passes
from diffc.backends.tensorrt.build import EngineReport
from diffc.compile.cached.noise import CacheNoise
from diffc.compile.experts import expert_requests
from diffc.compile.graphs import Graphs, write
from diffc.compile.keys import key_of
from diffc.compile.live import LiveModel, is_model_object, read_live
from diffc.compile.manifest import described_checkpoint, manifest
from diffc.compile.onnx_model import compile_onnx
from diffc.compile.plan import Plan, assumed, check, check_targets, describe
from diffc.compile.quantize import quantize
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest, CompileResult
from diffc.compile.shared import Calibrations
from diffc.compile.stages import (
    build,
    explain,
    hold_interface,
    measure,
    resolve_cache,
    rewrite,
    trace,
    unreached,
    validate,
)
from diffc.errors import UsageError
from diffc.models.sources.backbone import FakeBackbone, check_weights
from diffc.paths import AnyPath
from diffc.progress import Parts, Reporter
from diffc.progress_bar import default_reporter
from diffc.quantize.checkpoint import Checkpoint
from diffc.validate.reports import ShapeReport

__all__ = ["CompileRequest", "CompileResult", "Plan", "check", "check_targets", "compile_model"]


@overload
def compile_model(model: CompileRequest, output: Reporter | None = None) -> CompileResult: ...


@overload
def compile_model(
    model: Any, output: AnyPath, ui: Reporter | None = None, **settings: Any
) -> CompileResult: ...


def compile_model(
    model: Any, output: AnyPath | Reporter | None = None, ui: Reporter | None = None, **settings: Any
) -> CompileResult:
    """Compile a backbone: quantize, trace, rewrite, write, validate, build; the artifact appears when all is done.

    `model`: a CompileRequest, then with a Reporter at most. Otherwise what MODEL of the command line can be, or a
    diffusers pipeline or backbone in memory, with `output`, the folder to write, and `settings`, the other fields of
    CompileRequest. Of a model in memory the live weights are compiled: a LoRA that was fused into them counts, and
    quantizers of mtq.quantize are the calibration. A pipeline calibrates as it is, and is as before at the end.

    Raises DiffcError or PassError for what the user can fix, MismatchError when outputs differ.
    """
    if isinstance(model, CompileRequest):
        reporter: Any = ui or output or default_reporter()
        return _compile(model, reporter)
    if output is None or not isinstance(output, str | os.PathLike):
        raise UsageError(
            "compile_model is given a model and no folder to write", fix="compile_model(model, output)"
        )
    ui = ui or default_reporter()
    if not is_model_object(model):
        return _compile(CompileRequest(model, output, **settings), ui)
    with read_live(model, ui) as live:
        request = CompileRequest(live.source.name, output, **settings)
        if live.checkpoint is not None:
            request = of_calibration(request, live.checkpoint)
        return _compile(request, ui, live)


def of_calibration(request: CompileRequest, checkpoint: Checkpoint) -> CompileRequest:
    """The request with the format of a model that was quantized in memory. Raises UsageError for another one."""
    if request.format not in ("auto", "none", checkpoint.format):
        raise UsageError(
            f"the model was quantized to {checkpoint.format} by mtq.quantize, and {request.format} is asked for",
            fix="leave format out, or give the model before mtq.quantize",
        )
    if request.from_checkpoint is not None:
        raise UsageError(
            "the model was quantized by mtq.quantize, and has a calibration of its own",
            fix="leave from_checkpoint out, or give the model before mtq.quantize",
        )
    return replace(request, format=checkpoint.format)


@dataclass(frozen=True)
class Made:
    """What a compile has before it builds engines: the stages after it, for other GPUs too, take no more than this.

    `hashes` are those of the files that were written with the weights; `files` all files of the artifact by then.
    """

    plan: Plan
    checkpoint: Checkpoint | None
    noise: CacheNoise | None
    graphs: Graphs
    validation: Sequence[ShapeReport]
    hashes: Mapping[str, str]
    files: tuple[str, ...]


def _compile(request: CompileRequest, ui: Reporter, live: LiveModel | None = None) -> CompileResult:
    """The compile of a request, whose model may be in memory."""
    if request.model.endswith(".onnx"):
        return compile_onnx(request, ui)
    ui = Recorded(ui)
    plan = check(request) if live is None else check(request, live.source, live.checkpoint)
    return compile_plan(plan, ui)[1]


def compile_plan(
    plan: Plan, ui: Recorded, calibrations: Calibrations | None = None
) -> tuple[Made, CompileResult]:
    """The compile of a plan. `calibrations`: where an equal calibration is looked for, and a new one is kept."""
    backbone = FakeBackbone(plan.source, plan.dtype)
    check_weights(backbone)
    ui.note(describe(plan))
    for applied in plan.source.loras:
        ui.note(applied.summary())
    for line in (*assumed(plan), *filter(None, [unreached(plan, backbone)])):
        ui.note(line)
    parts = Parts(ui, part_names(plan))
    cache = resolve_cache(plan, backbone, ui)
    request = plan.request
    expert_requests(request, plan.source, request.output)  # what cannot be is refused before any work
    hold_interface(plan, ui)
    with staging(request.output, force=request.force, key=key_of(plan), note=ui.note) as folder:
        checkpoint = quantize(plan, backbone, folder, parts["quantize"], calibrations)
        noise = measure(plan, cache, checkpoint, parts["quantize"])
        traced = trace(plan, backbone, checkpoint, parts["trace"])
        graphs = rewrite(plan, backbone, traced, cache, parts["rewrite"])
        hashes = write(graphs, folder, parts["write"])
        validation = validate(plan, checkpoint, graphs, folder, parts["validate"])
        made = Made(plan, checkpoint, noise, graphs, validation, hashes, file_names(folder))
        written, engines = finish(plan, made, folder, ui)
    return made, result_of(plan, made, written, engines)


def finish(
    plan: Plan, made: Made, folder: Path, ui: Recorded
) -> tuple[dict[str, Any], Sequence[EngineReport]]:
    """Build the engines of `plan` beside the files of `made` in `folder`, and write the manifest, which is returned."""
    graphs, validation = made.graphs, made.validation
    engines = build(plan, graphs, folder, Parts(ui, part_names(plan))["build"])
    explain(plan, graphs, validation, engines, folder)
    experts = compile_experts(plan, folder, ui)
    content = {**manifest(plan, graphs, validation, engines, made.noise), **experts}
    content |= described_checkpoint(made.checkpoint)
    save_passes(graphs.records, folder)
    ui.save(folder, engines)
    return write_manifest(folder, content, made.hashes), engines


def result_of(
    plan: Plan, made: Made, written: dict[str, Any], engines: Sequence[EngineReport]
) -> CompileResult:
    """What a compile returns, its engines where they are now."""
    output = plan.request.output
    moved = [engine.moved(output / "engines") for engine in engines]
    return CompileResult(Artifact(output, written), made.graphs.records, made.validation, moved)


def compile_experts(plan: Plan, folder: Path, ui: Reporter) -> dict[str, Any]:
    """Compile the other experts of the pipeline into `folder`; the entry of the manifest that names them."""
    wanted = expert_requests(plan.request, plan.source, folder)
    for name, request in wanted.items():
        ui.note(f"{name}: the pipeline's backbone for other times")
        _compile(request, ui)
    return {"experts": list(wanted)} if wanted else {}


def part_names(plan: Plan) -> tuple[str, ...]:
    """The parts that this compile has, in order."""
    parts = {
        "quantize": plan.format.quantizes,
        "trace": True,
        "rewrite": True,
        "write": True,
        "validate": not plan.request.skip_validation,
        "build": any(target.is_engine for target in plan.targets),
    }
    return tuple(name for name, there in parts.items() if there)
