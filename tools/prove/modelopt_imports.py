"""Takes the exports of tools.prove.modelopt_exports through diffc, and prints what became of each.

    python -m tools.prove.modelopt_imports EXPORTS WORK [--only sdxl] [--no-engines]

For every export: whether it compiles for ONNX Runtime, whether model.onnx opens with its default options, how
far its outputs are from those of the torch model (relative L2, in float32, at the traced size and at another), how
far those of diffc.load are where the file has a family, and which engines TensorRT-RTX builds. One line of JSON each,
also in WORK/results.jsonl; what stands there is skipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import diffc
from diffc.artifact.folder import Artifact
from diffc.compile.import_profile import named_dimensions
from diffc.compile.onnx_model import compile_onnx
from diffc.compile.request import CompileRequest
from diffc.errors import DiffcError
from diffc.frontend.onnx_file import read_model
from diffc.models.inputs import forward_kwargs
from diffc.models.registry import find_family
from diffc.progress import Silent
from diffc.validate.float32 import cpu_session, feed, float32_copy
from passes import PassError
from passes.storage import load

BAKED = ("flux", "ltx", "wan")
"""Models whose export runs at the traced size alone."""
FIRST_SM = {"fp8": 89, "mxfp8": 89, "nvfp4": 120, "svd": 120}
SMS = (89, 120)


def main() -> None:
    """One line for every export that has none yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("exports", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-engines", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    log = args.work / "results.jsonl"
    known = [json.loads(line)["export"] for line in log.read_text().splitlines()] if log.exists() else []
    for folder in sorted(args.exports.iterdir()):
        if args.only in folder.name and folder.name not in known and (folder / "model.onnx").exists():
            line = json.dumps({"export": folder.name, **taken(folder, args.work, not args.no_engines)})
            print(line, flush=True)
            with log.open("a") as file:
                file.write(line + "\n")


def taken(folder: Path, work: Path, engines: bool) -> dict[str, Any]:
    """What became of one export."""
    model, format, _ = folder.name.split("-")
    with np.load(folder / "reference.npz") as held:
        reference = dict(held)
    sizes = [0] if model in BAKED else [0, 1]
    try:
        profile = _profile(read_model(folder / "model.onnx").model, reference, sizes)
    except (DiffcError, PassError) as error:
        return {"read": str(error).replace("\n", " ")[:600]}
    output = work / "artifact"
    found: dict[str, Any] = {}
    sms = [sm for sm in SMS if sm >= FIRST_SM.get(format.partition("+")[0], 0)] if engines else []
    for targets, built in [(("ort",), ()), *((("trt-rtx",), (sm,)) for sm in sms)]:
        shutil.rmtree(output, ignore_errors=True)
        request = CompileRequest(
            str(folder / "model.onnx"), output, targets=targets, sms=built, profile=profile
        )
        name = targets[0] + "".join(f"-sm{sm}" for sm in built)
        try:
            result = compile_onnx(request, Silent())
        except (DiffcError, PassError) as error:
            found[name] = str(error).replace("\n", " ")[:600]
            continue
        checks = [r.check for r in result.passes if r.changed]
        found[name] = "ok"
        if targets == ("ort",):
            found["compared"] = f"{sum('outputs within' in c for c in checks)} of {len(checks)}"
            found["why not"] = sorted(
                {c.partition("not compared")[2][:160] for c in checks if "not compared" in c}
            )
            found["opens"] = _opens(output / "model.onnx")
            found["error"] = _errors(output / "model.onnx", reference, sizes)
            found["diffc.load"] = _loaded(output, reference, sizes)
    return found


def _profile(model: onnx.ModelProto, reference: Mapping[str, Any], sizes: list[int]) -> str:
    """`--profile` that holds the inputs of all `sizes`."""
    found: dict[str, set[int]] = {}
    for name, dims in named_dimensions(model).items():
        for size in sizes:
            for dim, length in zip(dims, reference[f"in{size}_{name}"].shape, strict=True):
                if isinstance(dim, str):
                    found.setdefault(dim, set()).add(length)
    return ",".join(f"{name}={min(all_)}:{min(all_)}:{max(all_)}" for name, all_ in found.items())


def _opens(path: Path) -> str:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has one class per status code
        return str(error).splitlines()[0][:200]
    return "ok"


def _errors(path: Path, reference: Mapping[str, Any], sizes: list[int]) -> dict[str, float] | str:
    """Relative L2 distance from the torch model in float32, and torch's own from it in the type of the export."""
    found = {}
    try:
        copy = float32_copy(load(path))
        with cpu_session(copy) as session:
            for size in sizes:
                feeds = {v.name: reference[f"in{size}_{v.name}"] for v in copy.graph.input}
                (got,) = session.run(feed(copy, feeds)).values()
                found[f"size {size}"] = _distance(got, reference[f"wide{size}"])
                found[f"torch {size}"] = _distance(reference[f"out{size}"], reference[f"wide{size}"])
    except DiffcError as error:
        return str(error).replace("\n", " ")[:300]
    return found


def _loaded(artifact: Path, reference: Mapping[str, Any], sizes: list[int]) -> dict[str, float] | str:
    """Relative L2 distance of the module of diffc.load, which diffusers' pipelines call, from the torch model."""
    try:
        with diffc.load(artifact, target="ort") as module:
            spec, found = find_family(Artifact.load(artifact).manifest["model"]["family"]), {}
            for size in sizes:
                values = {
                    item.name: torch.from_numpy(reference[f"in{size}_{item.name}"])
                    for item in spec.inputs(module.config)
                }
                (got,) = module(**forward_kwargs(spec, module.config, values), return_dict=False)
                found[f"size {size}"] = _distance(got.float().numpy(), reference[f"wide{size}"])
            return found
    except DiffcError as error:
        return str(error).replace("\n", " ")[:300]


def _distance(got: Any, want: Any) -> float:
    return float(f"{np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want):.2e}")


if __name__ == "__main__":
    main()
