"""`diffc.load`: an artifact on disk -> the module that takes the place of a pipeline's backbone."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch

from diffc.artifact.folder import Artifact
from diffc.backends.onnxruntime import run as ort
from diffc.backends.onnxruntime.recorded import RecordedOrt
from diffc.backends.profile import Profile
from diffc.backends.session import Session
from diffc.backends.signature import TORCH_TYPES, Signature
from diffc.backends.tensorrt import run as engine
from diffc.errors import DiffcError, unknown_value
from diffc.models.registry import find_family
from diffc.runtime.cached import open_cached
from diffc.runtime.module import CompiledBackbone
from diffc.runtime.profile import profile_of
from passes.files.atomic import open_new
from passes.files.contained import why_outside

# What runs an artifact, fastest first -> the target of the compile whose graph or engine it takes.
_TAKES: Mapping[str, str] = {
    "trt-rtx": "trt-rtx",
    "tensorrt": "tensorrt",
    "ort-trt-rtx": "ort-trt-rtx",
    "ort-tensorrt": "tensorrt",
    "ort-cuda": "ort-cuda",
    "ort": "ort",
}
_ENGINES = ("trt-rtx", "tensorrt")
_RECORDED = ("trt-rtx", "ort-cuda")  # targets that take cuda_graph
_PREFIX: Mapping[str, str] = {"ort-trt-rtx": "nv", "ort-tensorrt": "trt"}  # of the providers' options


def load(
    artifact: str | Path,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    cuda_graph: bool = False,
    cache: bool = True,
) -> CompiledBackbone:
    """The compiled backbone of an artifact, to put in the place of `pipe.transformer` or `pipe.unet`.

    `target`: trt-rtx, tensorrt, ort-trt-rtx, ort-tensorrt (ONNX Runtime's TensorRT provider, on the graph that was
    compiled for tensorrt), ort-cuda or ort; by default the first of these that the artifact was compiled for
    and that runs here, on `device` where it is given. `dtype`: the type that the pipeline is told
    to work in, by default the compute type; the graph computes in its own. `verify`: hash every file first.
    `cuda_graph`: record the launches of each shape and replay them (trt-rtx, ort-cuda). `cache`: follow the
    cache plan of the compile, if there was one; False runs every step in full. Raises DiffcError when the
    artifact is damaged, was compiled for none of what runs here, or the target does not come up; nothing falls
    back.
    """
    found = Artifact.load(Path(artifact).expanduser().absolute())
    if verify:
        found.verify()
    model = found.manifest["model"]
    if "family" not in model:
        raise DiffcError(
            f"{found.folder} was compiled from the file {model['name']}, which tells no diffusers backbone",
            fix="compile the diffusers model, or run model.onnx in a session of your own",
        )
    spec = find_family(model["family"])
    chosen, where = resolve(found, target, device)
    signature = Signature.of(found.manifest, spec.dims(model["config"]))
    if chosen in (*_ENGINES, *_PREFIX):
        signature = replace(signature, profiles=(profile_of(found.manifest, spec, signature),))
    models = found.manifest.get("cache", {}).get("models", ())
    if models and (cache or chosen in _ENGINES):  # of engines there are none without kept outputs
        session: Session = open_cached(
            found, spec, signature, lambda a, s: _open(a, chosen, where, s, cuda_graph), follow=cache
        )
    else:
        session = _open(found, chosen, where, signature, cuda_graph)
    own = TORCH_TYPES[{"float32": "FLOAT"}.get(found.manifest["dtype"], found.manifest["dtype"].upper())]
    return CompiledBackbone(session, signature, spec, model["config"], dtype or own, chosen)


def resolve(
    artifact: Artifact, target: str | None = None, device: str | torch.device | None = None
) -> tuple[str, torch.device]:
    """The runtime target and the device that `load` takes for these; nothing is opened. Raises as `load` does."""
    where = None if device is None else _device(torch.device(device))
    chosen = _choose(artifact, target, where)
    return chosen, where or _device(torch.device("cpu" if chosen == "ort" else "cuda"))


def _device(device: torch.device) -> torch.device:
    """`device` with its number, as tensors tell theirs."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _choose(artifact: Artifact, target: str | None, device: torch.device | None) -> str:
    """The runtime target. Raises DiffcError that tells why each one that the artifact has cannot be used."""
    if target is not None and target not in _TAKES:
        raise unknown_value("runtime target", target, _TAKES)
    compiled = artifact.manifest["targets"]
    there = [name for name, needs in _TAKES.items() if needs in compiled]
    if target is not None and target not in there:
        raise DiffcError(
            f"{artifact.folder} was compiled for {', '.join(compiled)}, and target {target!r} takes another graph",
            fix=f"compile again with --target {_TAKES[target]}, or choose from: {', '.join(there)}",
        )
    reasons = {}
    for name in there if target is None else [target]:
        reason, fix = _why_not(artifact, name, device)
        if not reason:
            return name
        reasons[name] = f"{reason} ({fix})" if fix else reason
    raise DiffcError(
        f"{artifact.folder} does not run here. "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        fix="fix one of these, or compile with --target ort, which runs on every CPU",
    )


def _why_not(artifact: Artifact, name: str, device: torch.device | None) -> tuple[str, str]:
    """Why `name` cannot be used here, on `device` if it is given, and what fixes it."""
    if device is not None and (device.type == "cpu") != (name == "ort"):
        return f"it does not run on {device}", ""
    if name == "ort" and artifact.manifest.get("dtype") == "bfloat16":
        return "ONNX Runtime's CPU kernels have no bfloat16", "compile with --dtype float16 or float32"
    if name not in _ENGINES:
        return ort.why_not(name)
    reason, fix = engine.why_not(name)
    if reason:
        return reason, fix
    try:
        engine.pick_engine(artifact.manifest["engines"], name, _sm(device))
    except DiffcError as error:
        return error.what, error.fix
    return "", ""


def _sm(device: torch.device | None) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _open(
    artifact: Artifact, target: str, device: torch.device, signature: Signature, cuda_graph: bool
) -> Session:
    """The session of a target."""
    if cuda_graph and target not in _RECORDED:
        raise DiffcError(
            f"CUDA graphs are there for targets {' and '.join(_RECORDED)}", fix="leave out cuda_graph=True"
        )
    if target in _ENGINES:
        entry = engine.pick_engine(artifact.manifest["engines"], target, _sm(device))
        file = artifact.folder / entry["file"]
        cache = None if target == "tensorrt" else _cache(artifact, file.stem + ".kernels")
        weights = artifact.folder / entry["weights"] if "weights" in entry else None
        wanted = engine.EnginePlan(file, target, device, signature.profiles, cache, cuda_graph, weights)
        return engine.Engine(wanted, signature)
    name = artifact.manifest["targets"][_TAKES[target]]
    plan = ort.OrtPlan(artifact.folder / name, target, device, _ranges(target, signature.profiles))
    if target in _PREFIX and (folder := _cache(artifact, f"{target}-{_build_key(artifact, name, device)}")):
        kept = {"ort-trt-rtx": {"nv_runtime_cache_path": f"{folder}.kernels"}}.get(
            target, {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}
        )
        context = folder if target == "ort-trt-rtx" else None
        plan = replace(plan, options={**plan.options, **kept}, context=context)
    return RecordedOrt(plan, signature) if cuda_graph else ort.OrtModel(plan, signature)


def _ranges(target: str, profiles: tuple[Profile, ...]) -> dict[str, str]:
    """The ranges of shapes, in the options of ONNX Runtime's TensorRT providers."""
    if target not in _PREFIX:
        return {}
    bounds = ("min", "opt", "max")
    return {f"{_PREFIX[target]}_profile_{b}_shapes": profile_text(profiles[0], b) for b in bounds}


def _build_key(artifact: Artifact, file: str, device: torch.device) -> str:
    """Changes with everything that what a TensorRT provider builds depends on."""
    import onnxruntime

    versions = sorted(
        f"{d.name} {d.version}"
        for d in importlib.metadata.distributions()
        if d.name.startswith(("onnxruntime", "tensorrt"))
    )
    weights = artifact.manifest["files"].get("model.onnx_data", {})
    parts = [artifact.manifest["files"][file], weights, versions, onnxruntime.__version__]
    text = repr([*parts, torch.cuda.get_device_name(device)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def profile_text(profile: Profile, bound: str) -> str:
    """`name:1x2x3,name:4x5`, as ONNX Runtime's TensorRT providers read ranges; scalars have no range."""
    shapes = {name: getattr(sizes, bound) for name, sizes in profile.inputs.items()}
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items() if shape)


def _cache(artifact: Artifact, name: str) -> Path | None:
    """A place in the artifact's cache folder; None where that cannot be written, or leads out of the artifact."""
    folder = artifact.folder / "cache"
    if why_outside(artifact.folder, "cache") or why_outside(artifact.folder, f"cache/{name}"):
        return None
    try:
        folder.mkdir(exist_ok=True)
        probe = folder / f".{uuid4().hex}"
        open_new(probe).close()
        probe.unlink()
    except OSError:
        return None
    return folder / name
