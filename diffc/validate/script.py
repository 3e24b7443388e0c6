"""`diffc validate --script`: the comparisons as files that `polygraphy run` repeats without diffc."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from diffc.errors import DiffcError
from diffc.validate.compare import save_inputs, save_outputs
from diffc.validate.float32 import emulated, float32_copy, runs_on_cpu, unrounded_copy
from diffc.validate.reports import UNROUNDED, ShapeReport, file_name
from passes.files.contained import safe_name
from passes.storage import save

# Both are written as they are, whatever the model is called: what belongs to a case is in its JSON.
_LOADER = '''"""The inputs beside this file, for `polygraphy run --data-loader-script`."""

import json
from pathlib import Path

from polygraphy.json import load_json

CASE = Path(__file__).name.removesuffix("-load.py")
INPUTS = Path(__file__).with_name(f"{CASE}-inputs.json")
TYPES = json.loads(Path(__file__).with_name(f"{CASE}-case.json").read_text("utf-8"))["types"]


def load_data():
    for values in load_json(str(INPUTS)):
        yield {name: array.astype(TYPES[name]) for name, array in values.items()}
'''

_COMPARE = '''"""Relative L2 error in float64, for `polygraphy run --compare-func-script`."""

import json
from pathlib import Path

import numpy as np

CASE = Path(__file__).name.removesuffix("-compare.py")
LIMIT = json.loads(Path(__file__).with_name(f"{CASE}-case.json").read_text("utf-8"))["limit"]


def compare_outputs(first, second):
    """Whether each output passes. First is the run, second the reference: --load-outputs comes last."""
    passed = {}
    for name in dict.fromkeys([*first.keys(), *second.keys()]):
        if name not in first or name not in second:
            print(f"{name!r}: missing on one side")
            passed[name] = False
            continue
        result, reference = (np.asarray(side[name], np.float64) for side in (first, second))
        norm = np.linalg.norm(reference)
        error = np.linalg.norm(result - reference) / norm if result.shape == reference.shape and norm else np.nan
        passed[name] = bool(error <= LIMIT)
        print(f"{name!r}: relative L2 error {error:.3g}, limit {LIMIT:g}")
    return passed
'''


def check_folder(folder: Path) -> None:
    """Raise DiffcError when `folder` holds something: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DiffcError(f"{folder} exists and is not empty", fix="name a new folder")


def write_script(folder: Path, models: Mapping[str, onnx.ModelProto], reports: Sequence[ShapeReport]) -> None:
    """Write the graphs, the inputs, reference outputs and scripts of each comparison, and run.sh, which runs them all.

    run.sh needs a POSIX shell and Polygraphy with ONNX Runtime. Chaotic comparisons are left out: roundings decide
    them, which `polygraphy run` cannot judge.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, onnx.ModelProto] = {}
    lines = []
    for report in (r for r in reports if not r.chaotic):
        graph = safe_name(f"{Path(report.model).stem}-{_kind(report)}") + ".onnx"
        if graph not in written:
            written[graph] = _graph(models[report.model], report)
            save(written[graph], folder / graph)
        name = f"{file_name(report)}-seed{report.seed}"
        _write_case(folder, name, written[graph], report)
        lines.append(_command(name, graph))
    text = '#!/bin/sh\nset -e\ncd "$(dirname "$0")"\n' + "\n".join(lines) + "\n"
    (folder / "run.sh").write_text(text, encoding="utf-8")


def _kind(report: ShapeReport) -> str:
    return "unrounded" if report.arithmetic == UNROUNDED else report.arithmetic.replace(", ", "-")


def _graph(model: onnx.ModelProto, report: ShapeReport) -> onnx.ModelProto:
    """The graph that the report ran, for ONNX Runtime on the CPU."""
    if report.arithmetic == UNROUNDED:
        return emulated(unrounded_copy(model))
    own = report.arithmetic != "float32" and runs_on_cpu(model)
    return emulated(model if own else float32_copy(model))


def _write_case(folder: Path, name: str, graph: onnx.ModelProto, report: ShapeReport) -> None:
    types = {
        v.name: str(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type))
        for v in graph.graph.input
    }
    save_inputs(report.inputs, folder / f"{name}-inputs.json")
    save_outputs(report.reference, "reference", folder / f"{name}-reference.json")
    case = {"types": types, "limit": report.rows[0].tolerance}
    (folder / f"{name}-case.json").write_text(json.dumps(case, indent=1) + "\n", encoding="utf-8")
    for suffix, text in (("load", _LOADER), ("compare", _COMPARE)):
        (folder / f"{name}-{suffix}.py").write_text(text, encoding="utf-8")


def _command(name: str, graph: str) -> str:
    return shlex.join(
        (
            "polygraphy",
            "run",
            graph,
            "--onnxrt",
            "--graph-optimization-level",
            "ORT_ENABLE_BASIC",
            "--data-loader-script",
            f"{name}-load.py",
            "--load-outputs",
            f"{name}-reference.json",
            "--compare-func-script",
            f"{name}-compare.py",
        )
    )
