"""Comparisons as files that `polygraphy run` repeats without diffc, on Linux and on Windows."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from diffc.backends.profile import Profile
from passes.files.atomic import write_text

RTX = {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
"""With it, Polygraphy's --trt is TensorRT-RTX."""

# Both are written as they are, whatever the model is called: what belongs to a case is in its JSON.
LOADER = '''"""The inputs beside this file, for `polygraphy run --data-loader-script`."""

import json
from pathlib import Path

from polygraphy.json import load_json

CASE = Path(__file__).name.removesuffix("-load.py")
DETAILS = json.loads(Path(__file__).with_name(f"{CASE}-case.json").read_text("utf-8"))
INPUTS = Path(__file__).with_name(DETAILS["inputs"])


def typed(array, name):
    """The array in the type of the graph's input; numpy has no bfloat16, torch has."""
    if name != "bfloat16":
        return array.astype(name)
    import torch

    return torch.from_numpy(array.astype("float32")).to(torch.bfloat16)


def load_data():
    for values in load_json(str(INPUTS)):
        yield {name: typed(array, DETAILS["types"][name]) for name, array in values.items()}
'''

COMPARE = '''"""Relative L2 error in float64, for `polygraphy run --compare-func-script`."""

import json
from pathlib import Path

import numpy as np

CASE = Path(__file__).name.removesuffix("-compare.py")
LIMIT = json.loads(Path(__file__).with_name(f"{CASE}-case.json").read_text("utf-8"))["limit"]


def numbers(values):
    """In float64; bfloat16 comes as a tensor of torch."""
    return np.asarray(values.float().cpu() if hasattr(values, "cpu") else values, np.float64)


def compare_outputs(first, second):
    """Whether each output passes. First is the run, second the reference: --load-outputs comes last."""
    passed = {}
    for name in dict.fromkeys([*first.keys(), *second.keys()]):
        if name not in first or name not in second:
            print(f"{name!r}: missing on one side")
            passed[name] = False
            continue
        result, reference = (numbers(side[name]) for side in (first, second))
        norm = np.linalg.norm(reference)
        error = np.linalg.norm(result - reference) / norm if result.shape == reference.shape and norm else np.nan
        passed[name] = bool(error <= LIMIT)
        print(f"{name!r}: relative L2 error {error:.3g}, limit {LIMIT:g}")
    return passed
'''


def input_types(model: onnx.ModelProto) -> dict[str, str]:
    """The type of each input of a graph, as numpy and torch call it."""
    return {
        v.name: str(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type))
        for v in model.graph.input
    }


def write_case(folder: Path, name: str, *, inputs: str, types: Mapping[str, str], limit: float) -> None:
    """Write the loader and the comparison of a case; `inputs` is the file in `folder` that has its inputs."""
    case = {"inputs": inputs, "types": dict(types), "limit": limit}
    write_text(folder / f"{name}-case.json", json.dumps(case, indent=1) + "\n")
    for suffix, text in (("load", LOADER), ("compare", COMPARE)):
        write_text(folder / f"{name}-{suffix}.py", text)


def in_onnxruntime(name: str, graph: str, reference: str, *, exact: bool) -> list[str]:
    """The command that runs a case's graph in ONNX Runtime on the CPU; `exact`: with basic optimizations only."""
    level = ["--graph-optimization-level", "ORT_ENABLE_BASIC"] if exact else []
    return ["polygraphy", "run", graph, "--onnxrt", *level, *_compared(name, reference)]


def in_engine(name: str, engine: str, reference: str) -> list[str]:
    """The command that runs a case in an engine that is built."""
    return ["polygraphy", "run", engine, "--model-type", "engine", "--trt", *_compared(name, reference)]


def in_tensorrt(name: str, graph: str, reference: str, profile: Profile | None) -> list[str]:
    """The command that builds an engine of a case's graph for the GPU at hand, and runs it."""
    ranges = []
    for bound in ("min", "opt", "max") if profile is not None else ():
        assert profile is not None
        shapes = {n: getattr(sizes, bound) for n, sizes in profile.inputs.items() if getattr(sizes, bound)}
        ranges += [
            f"--trt-{bound}-shapes",
            *(f"{n}:[{','.join(map(str, shape))}]" for n, shape in shapes.items()),
        ]
    build = ["--trt", "--strongly-typed", *ranges]
    return ["polygraphy", "run", graph, *build, *_compared(name, reference)]


def _compared(name: str, reference: str) -> list[str]:
    return [
        *("--data-loader-script", f"{name}-load.py"),
        *("--load-outputs", reference),
        *("--compare-func-script", f"{name}-compare.py"),
    ]


def write_runner(
    folder: Path, stem: str, commands: Sequence[Sequence[str]], variables: Mapping[str, str] | None = None
) -> None:
    """Write stem.sh (a POSIX shell) and stem.bat (Windows), which run the commands and stop at the first failure."""
    variables = variables or {}
    shell = [f"export {name}={value}" for name, value in variables.items()] + [*map(shlex.join, commands)]
    write_text(folder / f"{stem}.sh", "\n".join(["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"', *shell, ""]))
    batch = [f"set {name}={value}" for name, value in variables.items()]
    batch += [f"{subprocess.list2cmdline(command)} || exit /b 1" for command in commands]
    write_text(folder / f"{stem}.bat", "\r\n".join(["@echo off", 'cd /d "%~dp0"', *batch, ""]))
