"""`diffc validate --script`: the comparisons as files that `polygraphy run` repeats without diffc."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from diffc.backends.profile import Profile
from diffc.errors import DiffcError
from diffc.validate.compare import save_inputs, save_outputs
from diffc.validate.float32 import emulated, float32_copy, runs_on_cpu, unrounded_copy
from diffc.validate.polygraphy_case import (
    RTX,
    in_onnxruntime,
    in_tensorrt,
    input_types,
    write_case,
    write_runner,
)
from diffc.validate.reports import UNROUNDED, ShapeReport, file_name
from passes.files.contained import safe_name
from passes.storage import save

_PLAIN = re.compile(r"[\w.]+")
"""Names of inputs that a command line can hold on every system."""


@dataclass(frozen=True)
class RtxGraph:
    """What an engine of target trt-rtx is built of: the model's file, its profile, and the limit of its error."""

    file: str
    profile: Profile | None
    limit: float


def check_folder(folder: Path) -> None:
    """Raise DiffcError when `folder` holds something: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DiffcError(f"{folder} exists and is not empty", fix="name a new folder")


def write_script(
    folder: Path,
    models: Mapping[str, onnx.ModelProto],
    reports: Sequence[ShapeReport],
    rtx: RtxGraph | None = None,
) -> None:
    """Write the graphs, the inputs, reference outputs and scripts of each comparison, and what runs them all.

    run.sh and run.bat take Polygraphy with ONNX Runtime. With `rtx`, rtx.sh and rtx.bat build an engine of its graph
    with TensorRT-RTX for the GPU of the machine and compare it. Chaotic comparisons are left out: roundings decide
    them, which `polygraphy run` cannot judge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [report for report in reports if not report.chaotic]
    written: dict[str, onnx.ModelProto] = {}
    commands = []
    for report in kept:
        graph = safe_name(f"{Path(report.model).stem}-{_kind(report)}") + ".onnx"
        if graph not in written:
            written[graph] = _graph(models[report.model], report)
            save(written[graph], folder / graph)
        name = _name(report)
        save_inputs(report.inputs, folder / f"{name}-inputs.json")
        save_outputs(report.reference, "reference", folder / f"{name}-reference.json")
        types = input_types(written[graph])
        write_case(folder, name, inputs=f"{name}-inputs.json", types=types, limit=report.rows[0].tolerance)
        commands.append(in_onnxruntime(name, graph, f"{name}-reference.json", exact=True))
    write_runner(folder, "run", commands)
    if rtx is not None:
        _write_rtx(folder, models, kept, rtx)


def _write_rtx(
    folder: Path, models: Mapping[str, onnx.ModelProto], reports: Sequence[ShapeReport], rtx: RtxGraph
) -> None:
    """The graph that engines are built of, compared where activations are rounded, once at each shape and seed."""
    mine = [r for r in reports if r.model == rtx.file and r.arithmetic != UNROUNDED]
    last = {(str(r.shape), r.seed): r for r in mine}  # of several arithmetics the graph's own comes last
    model = models.get(rtx.file)
    if model is None or not last or not all(_PLAIN.fullmatch(v.name) for v in model.graph.input):
        return
    graph = safe_name(f"{Path(rtx.file).stem}-trt-rtx") + ".onnx"
    save(model, folder / graph)
    commands = []
    for report in last.values():
        name, inputs = f"{_name(report)}-rtx", f"{_name(report)}-inputs.json"
        write_case(folder, name, inputs=inputs, types=input_types(model), limit=rtx.limit)
        commands.append(in_tensorrt(name, graph, f"{_name(report)}-reference.json", rtx.profile))
    write_runner(folder, "rtx", commands, RTX)


def _name(report: ShapeReport) -> str:
    return f"{file_name(report)}-seed{report.seed}"


def _kind(report: ShapeReport) -> str:
    return "unrounded" if report.arithmetic == UNROUNDED else report.arithmetic.replace(", ", "-")


def _graph(model: onnx.ModelProto, report: ShapeReport) -> onnx.ModelProto:
    """The graph that the report ran, for ONNX Runtime on the CPU."""
    if report.arithmetic == UNROUNDED:
        return emulated(unrounded_copy(model))
    own = report.arithmetic != "float32" and runs_on_cpu(model)
    return emulated(model if own else float32_copy(model))
