"""`diffc.load`: an artifact on disk -> the module that takes the place of a pipeline's backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from diffc.artifact.folder import Artifact
from diffc.backends.profile import Profile
from diffc.backends.session import ModelFile, Session, runtime_of
from diffc.backends.signature import Signature
from diffc.backends.target import RUNTIMES, Target, named_target
from diffc.backends.tensorrt.run import pick_engine
from diffc.backends.torch_types import TORCH_TYPES
from diffc.errors import DiffcError, unknown
from diffc.models.family import Family, misfits
from diffc.models.registry import family_of_manifest
from diffc.paths import AnyPath, as_path
from diffc.runtime.cached import open_cached
from diffc.runtime.interface import Interface, NamedSession
from diffc.runtime.lora import LoraSlots
from diffc.runtime.module import CompiledBackbone
from diffc.runtime.profile import profile_of
from passes.files.atomic import open_new
from passes.files.contained import why_outside


def load(
    artifact: AnyPath,
    *,
    target: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    cuda_graph: bool = False,
    cache: bool = True,
    config: Mapping[str, Any] | None = None,
    component: str | None = None,
) -> CompiledBackbone:
    """The compiled backbone of an artifact, which replaces `pipe.transformer` or `pipe.unet`.

    `target`: trt-rtx, tensorrt, ort-trt-rtx, ort-tensorrt (ONNX Runtime's TensorRT provider, on the graph that was
    compiled for tensorrt), ort-cuda or ort; by default the first of these that the artifact was compiled for
    and that runs here, on `device` where it is given. `dtype`: the type that the pipeline is told
    to work in, by default the compute type; the graph computes in its own. `verify`: hash every file first.
    `cuda_graph`: record the launches of each shape and replay them (trt-rtx, ort-cuda). `cache`: follow the
    cache plan of the compile, if there was one; False runs every step in full. `config`: the backbone's config.json,
    such as `pipe.transformer.config`, for an artifact of an ONNX file, which tells a part of it. `component`: which
    backbone, where the pipeline has one for each part of the schedule ("transformer_2"); None is the first. Raises
    DiffcError when the artifact is damaged, was compiled for none of what runs here, or the target does not come up;
    nothing falls back.
    """
    found = Artifact.load(as_path(artifact).absolute())
    if verify:
        found.verify()
    found = expert(found, component)
    model = found.manifest["model"]
    if "family" not in model:
        raise DiffcError(
            f"{found.folder} was compiled from the file {model['name']}, whose inputs are those of no family that diffc"
            " knows",
            fix="compile the diffusers model, or run model.onnx in a session of your own",
        )
    spec = family_of_manifest(model)
    chosen, where = resolve(found, target, device)
    full = _config_for(found, spec, config)
    signature, interface = signature_of(found, chosen, full), Interface.of_manifest(found.manifest)
    models = found.manifest.get("cache", {}).get("models", ())
    if models and (cache or chosen.is_engine):  # no engine of theirs is without kept outputs
        session: Session = open_cached(
            found, spec, signature, lambda a, s: open_model(a, chosen, where, s, cuda_graph), follow=cache
        )
    else:
        session = open_model(found, chosen, where, signature, cuda_graph)
    if interface is not None:
        session = NamedSession(session, interface, signature)
        signature = interface.with_names(signature)
    own = TORCH_TYPES[{"float32": "FLOAT"}.get(found.manifest["dtype"], found.manifest["dtype"].upper())]
    slots = LoraSlots.of(found.manifest, chosen.name)
    return CompiledBackbone(session, signature, spec, full, dtype or own, chosen.name, slots)


def expert(artifact: Artifact, component: str | None) -> Artifact:
    """The artifact of the backbone `component` of the pipeline. Raises DiffcError that lists those that there are."""
    model, others = artifact.manifest["model"], artifact.manifest.get("experts", [])
    own = family_of_manifest(model).component if "family" in model else None
    if component in (None, own):
        return artifact
    if component not in others:
        raise unknown(f"backbone of {artifact.folder}", str(component), [*filter(None, [own]), *others])
    return Artifact.load(artifact.folder / str(component))


def _config_for(artifact: Artifact, spec: Family, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The config that the artifact has, or the one `given`. Raises DiffcError where the latter is of other widths."""
    stated: Mapping[str, Any] = artifact.manifest["model"]["config"]
    if given is None:
        return stated
    differing = misfits(spec, stated, given)
    if differing:
        raise DiffcError(
            f"the config is of another backbone than {artifact.folder}: {'; '.join(differing)}",
            fix="give the pipeline that the artifact was made of",
        )
    return {**stated, **given}


def signature_of(
    artifact: Artifact, target: Target, config: Mapping[str, Any] | None = None, model: Artifact | None = None
) -> Signature:
    """What the graph or engine of a target takes, under the graph's own names.

    `model`: the artifact with one model of its cache plan. Dimensions are the family's where it is known.
    """
    described, inner = artifact.manifest["model"], (model or artifact).manifest
    if "family" not in described:
        ranges = artifact.manifest["profile"] if target.takes_ranges else ()
        return Signature.of(inner, (), [Profile.of_json(entry) for entry in ranges])
    spec, full = family_of_manifest(described), config or described["config"]
    signature = Signature.of(inner, spec.dims(full))
    interface = Interface.of_manifest(artifact.manifest)
    if interface is not None:
        signature = interface.with_dims(signature, spec, full)
    if target.takes_ranges:
        signature = replace(signature, profiles=(profile_of(artifact.manifest, spec, signature),))
    return signature


def resolve(
    artifact: Artifact, target: str | None = None, device: str | torch.device | None = None
) -> tuple[Target, torch.device]:
    """The runtime target and the device that `load` takes for these; nothing is opened. Raises as `load` does."""
    where = None if device is None else _device(torch.device(device))
    chosen = _choose(artifact, target, where)
    return chosen, where or _device(torch.device("cpu" if chosen.on_cpu else "cuda"))


def _device(device: torch.device) -> torch.device:
    """`device` with its number, as tensors tell theirs."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _choose(artifact: Artifact, target: str | None, device: torch.device | None) -> Target:
    """The runtime target. Raises DiffcError that tells why each one that the artifact has cannot be used."""
    if target is not None:
        named_target("runtime target", target, RUNTIMES)
    compiled = artifact.manifest["targets"]
    there = [name for name, known in RUNTIMES.items() if known.file_of in compiled]
    if target is not None and target not in there:
        raise DiffcError(
            f"{artifact.folder} was compiled for {', '.join(compiled)}, and target {target!r} takes another graph",
            fix=f"compile again with --target {RUNTIMES[target].file_of}, or choose from: {', '.join(there)}",
        )
    reasons = {}
    for name in there if target is None else [target]:
        reason, fix = why_not(artifact, RUNTIMES[name], device)
        if not reason:
            return RUNTIMES[name]
        reasons[name] = f"{reason} ({fix})" if fix else reason
    raise DiffcError(
        f"{artifact.folder} does not run here. "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
        fix="fix one of these, or compile with --target ort, which runs on every CPU",
    )


def why_not(artifact: Artifact, target: Target, device: torch.device | None) -> tuple[str, str]:
    """Why `target` cannot be used here, on `device` if it is given, and what fixes it."""
    if device is not None and (device.type == "cpu") != target.on_cpu:
        return f"it does not run on {device}", ""
    if not target.is_engine and (name := artifact.manifest["targets"][target.file_of]) in artifact.missing:
        return (
            f"{name} was left out of this copy",
            "use the whole artifact, or copy it with that file: diffc slim",
        )
    if target.on_cpu and artifact.manifest.get("dtype") == "bfloat16":
        return "ONNX Runtime's CPU kernels have no bfloat16", "compile with --dtype float16 or float32"
    reason, fix = runtime_of(target).why_not(target)
    if reason or not target.is_engine:
        return reason, fix
    try:
        pick_engine(artifact.engines, target.name, _sm(device))
    except DiffcError as error:
        return error.what, error.fix
    return "", ""


def _sm(device: torch.device | None) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def open_model(
    artifact: Artifact, target: Target, device: torch.device, signature: Signature, cuda_graph: bool = False
) -> Session:
    """The session of the model that a target runs. Raises DiffcError when it does not come up."""
    if cuda_graph and not target.records:
        recording = " and ".join(name for name, known in RUNTIMES.items() if known.records)
        raise DiffcError(f"CUDA graphs are there for targets {recording}", fix="leave out cuda_graph=True")
    manifest, cache = artifact.manifest, partial(_cache, artifact)
    if target.is_engine:
        entry = pick_engine(artifact.engines, target.name, _sm(device))
        weights = artifact.folder / entry["weights"] if "weights" in entry else None
        model = ModelFile(artifact.folder / entry["file"], target, device, cache, weights=weights)
    else:
        name = manifest["targets"][target.file_of]
        name = manifest.get("lora_slots", {}).get("files", {}).get(target.name, name)
        identity = (manifest["files"][name], manifest["files"].get("model.onnx_data", {}))
        model = ModelFile(artifact.folder / name, target, device, cache, identity)
    return runtime_of(target).open_session(replace(model, cuda_graph=cuda_graph), signature)


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
