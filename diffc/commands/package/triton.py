"""`diffc package --layout triton`: a model repository of the Triton Inference Server with the backbone.

    OUTPUT/NAME/config.pbtxt
    OUTPUT/NAME/1/model.onnx and its weights (ONNX Runtime), or model.plan (TensorRT)

A cache plan or LoRA slots need a caller that knows where its loop is, or which LoRA it wants: the server has neither,
so the model runs whole, with empty slots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from diffc.artifact.files import listed
from diffc.artifact.folder import Artifact, write_manifest
from diffc.backends.profile import Profile
from diffc.backends.signature import Signature
from diffc.backends.target import RUNTIMES, named_target
from diffc.commands.package.copying import copy_file
from diffc.commands.package.request import (
    Packaged,
    PackageRequest,
    check_backbone_alone,
    described,
    external_files,
)
from diffc.commands.package.triton_config import Backend, ModelConfig
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.registry import family_of_manifest
from diffc.progress import Reporter
from diffc.runtime.load import signature_of
from diffc.runtime.profile import profile_of
from passes import Pipeline
from passes.graph.onnx_reader import read_proto
from passes.targets.ort.guard_slices import GuardSlices

BACKENDS: Mapping[str, Backend] = {
    "tensorrt": Backend("tensorrt", "tensorrt_plan", "model.plan", on_gpu=True),
    "ort-cuda": Backend("onnxruntime", "onnxruntime_onnx", "model.onnx", on_gpu=True),
    "ort": Backend("onnxruntime", "onnxruntime_onnx", "model.onnx", on_gpu=False),
}
"""Targets whose models the server runs, the fastest first."""
_REFUSED = {
    "trt-rtx": "its TensorRT backend reads engines of TensorRT, and those of TensorRT-RTX are of another library",
    "ort-trt-rtx": "its ONNX Runtime backend has no TensorRT-RTX provider",
    "ort-tensorrt": "the graph for TensorRT is served as an engine, by the TensorRT backend",
}
_FIX = "compile with --target ort-cuda, ort or tensorrt"


def prepare(artifact: Artifact, request: PackageRequest) -> Callable[[Path, Reporter], Packaged]:
    """What writes the repository. Raises DiffcError for an artifact without a model that the server runs."""
    check_backbone_alone(request)
    target = _target(artifact, request.target)
    backend = BACKENDS[target]
    source = _engine(artifact) if target == "tensorrt" else _graph(artifact, target)
    signature = signature_of(artifact, RUNTIMES[target])
    config = ModelConfig(model_name(artifact), backend, signature, _profile(artifact, signature))
    _check_scalars(config)

    def write_package(folder: Path, ui: Reporter) -> Packaged:
        version = folder / config.name / "1"
        version.mkdir(parents=True)
        with ui.stage("model"):
            if target == "tensorrt":
                copy_file(source, version / backend.file)
            else:
                _write_graph(artifact, source, version / backend.file)
        (folder / config.name / "config.pbtxt").write_text(config.text(), encoding="utf-8")
        write_manifest(folder, {**described(artifact, request.layout), "target": target}, {})
        how = f"tritonserver --model-repository={request.output}"
        return Packaged(request.output, how, notes=tuple(_notes(artifact, config, target)))

    return write_package


def model_name(artifact: Artifact) -> str:
    """The name that the server has for the model: that of what was compiled, without characters of paths."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", artifact.manifest["model"]["name"]).strip("._-") or "model"


def _target(artifact: Artifact, wanted: str | None) -> str:
    compiled = artifact.manifest["targets"]
    if wanted is not None:
        named_target("target", wanted, RUNTIMES)
    names = [wanted] if wanted else [name for name in BACKENDS if name in compiled]
    refused = [name for name in names or compiled if name not in BACKENDS]
    if refused:
        raise UnsupportedError(
            f"Triton runs no model of target {refused[0]}: {_REFUSED.get(refused[0], 'it has no such backend')}",
            fix=_FIX,
        )
    if names[0] not in compiled:
        raise DiffcError(f"{artifact.folder} was compiled for {', '.join(compiled)}", fix=_FIX)
    return names[0]


def _engine(artifact: Artifact) -> Path:
    """The engine of target tensorrt, which is of the GPU that built it."""
    if "cache" in artifact.manifest:
        raise UnsupportedError(
            f"the engines of {artifact.folder} follow a cache plan, and the server does not know denoising steps",
            fix="compile without --cache-plan, or package it with --target ort-cuda",
        )
    found = [e for e in artifact.engines if e["target"] == "tensorrt"]
    if not found:
        raise DiffcError(
            f"{artifact.folder} has no tensorrt engine here", fix="compile with --target tensorrt"
        )
    if "weights" in found[0]:
        raise UnsupportedError(
            f"{found[0]['file']} was built without its weights, which the server does not fill in",
            fix="compile without --strip-weights",
        )
    return listed(artifact.folder, artifact.manifest, found[0]["file"])


def _graph(artifact: Artifact, target: str) -> Path:
    """The graph of a target of ONNX Runtime."""
    if target == "ort" and artifact.manifest.get("dtype") == "bfloat16":
        raise UnsupportedError(
            f"{artifact.folder} computes in bfloat16, for which ONNX Runtime's CPU provider has no kernels",
            fix="compile with --dtype float16, or with --target ort-cuda",
        )
    name = artifact.manifest["targets"][target]
    return listed(artifact.folder, artifact.manifest, artifact.present(name).name)


def _write_graph(artifact: Artifact, source: Path, file: Path) -> None:
    """The graph and its files of weights. The server's optimizations are all on, which need the guard of slices."""
    model = read_proto(source)
    taken = {name: listed(artifact.folder, artifact.manifest, name) for name in sorted(external_files(model))}
    onnx.save(Pipeline([GuardSlices()]).run(model).model, file)
    for name, weights in taken.items():
        copy_file(weights, file.with_name(name))


def _profile(artifact: Artifact, signature: Signature) -> Profile:
    """The shapes of the compile; of several profiles the first, which the server takes."""
    stated: Any = artifact.manifest["profile"]
    if isinstance(stated, list):
        return Profile.of_json(stated[0])
    return profile_of(artifact.manifest, family_of_manifest(artifact.manifest["model"]), signature)


def _check_scalars(config: ModelConfig) -> None:
    """Raise UnsupportedError for an engine with an input without dimensions, which its backend cannot be told of."""
    scalar = next((v.name for v in config.signature.inputs if not v.dims), None)
    if scalar is not None and config.backend.name == "tensorrt":
        raise UnsupportedError(
            f"the engine's input {scalar} has no dimensions, and dims of config.pbtxt cannot be empty",
            fix="package it with --target ort-cuda",
        )


def _notes(artifact: Artifact, config: ModelConfig, target: str) -> Iterator[str]:
    versions = artifact.manifest.get("versions", {})
    if target == "tensorrt":
        engine = next(e for e in artifact.engines if e["target"] == "tensorrt")
        yield f"the server's TensorRT must be {engine['version']}, on the kind of GPU that built the engine"
    elif "onnxruntime" in versions:
        yield f"checked with ONNX Runtime {versions['onnxruntime']}; an older one in the server may lack operators"
    if config.max_batch > 1:
        yield f"requests of equal shapes are joined, up to {config.max_batch} images"
    elif not config.max_batch:
        yield "requests are not joined: not every input begins with the batch"
    if "cache" in artifact.manifest:
        yield "every step runs the whole backbone: the server does not know denoising steps, which a cache plan needs"
    if "lora_slots" in artifact.manifest:
        yield "LoRA slots are left out: fuse a LoRA with diffc relora"
