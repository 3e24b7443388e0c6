"""`validation/` of an artifact: what `polygraphy run` repeats the comparisons of the compile with, limits included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from diffc.backends.target import TARGETS
from diffc.validate.float32 import runs_on_cpu
from diffc.validate.polygraphy_case import (
    RTX,
    in_engine,
    in_onnxruntime,
    input_types,
    write_case,
    write_runner,
)
from diffc.validate.reports import UNROUNDED, ShapeReport, file_name
from diffc.validate.tolerances import default_options_tolerance
from passes.files.atomic import write_text

README = """The comparisons of the compile, for `polygraphy run`: pip install polygraphy==0.53.6 onnxruntime==1.31.1

  run.sh, run.bat    the graphs in ONNX Runtime on the CPU, with its default options, against torch's outputs
  rtx.sh, rtx.bat    the engines of TensorRT-RTX: remove the lines of other GPUs (tensorrt-rtx of the manifest)
  NAME-inputs.json, NAME-torch.json    inputs, and the outputs of ModelOpt's torch model for them
  NAME-onnxruntime.json, NAME.json     what ONNX Runtime gave at the compile, and how far it was off
  NAME-case.json     the types of the inputs, and the limit of the relative L2 error that NAME-compare.py holds

Polygraphy's own limit (--rtol 1e-5) is none for 16 bits and quantized activations: use the scripts.
Which files there are depends on the targets of the compile.
"""


def write_repetition(
    folder: Path,
    models: Mapping[str, onnx.ModelProto],
    targets: Mapping[str, str],
    reports: Sequence[ShapeReport],
    engines: Sequence[Mapping[str, Any]],
    *,
    format: str,
    dtype: str,
) -> None:
    """Write the scripts into `folder`, which holds the files of `save_reports` and lies beside the models.

    `models` by file name, `targets`: the file of each, `engines` as a manifest has them. Nothing is written where there
    are no reports.
    """
    cases: dict[tuple[str, str], ShapeReport] = {}
    for report in (r for r in reports if r.arithmetic != UNROUNDED and r.model in models):
        cases[report.model, str(report.shape)] = report  # of several arithmetics the graph's own comes last
    for report in cases.values():
        # What is over the limit was found to be moved as far by roundings alone.
        limit = max(default_options_tolerance(format, dtype), min(3 * (report.floor or 0.0), 0.99))
        name, types = file_name(report), input_types(models[report.model])
        write_case(folder, name, inputs=f"{name}-inputs.json", types=types, limit=limit)
    on_cpu = {file for target, file in targets.items() if TARGETS[target].provider in _CPU_READS}
    graphs = [
        in_onnxruntime(file_name(r), f"../{r.model}", f"{file_name(r)}-torch.json", exact=False)
        for r in cases.values()
        if r.model in on_cpu and runs_on_cpu(models[r.model])
    ]
    built = [
        in_engine(file_name(r), f"../{engine['file']}", f"{file_name(r)}-torch.json")
        for engine in engines
        for r in cases.values()
        if targets.get(engine["target"]) == r.model and "weights" not in engine
        if engine["target"] == "trt-rtx"
    ]
    if graphs:
        write_runner(folder, "run", graphs)
    if built:
        write_runner(folder, "rtx", built, RTX)
    if cases:
        write_text(folder / "README.txt", README)


_CPU_READS = ("CPUExecutionProvider",)
"""Providers whose graphs ONNX Runtime's CPU provider opens as well."""
