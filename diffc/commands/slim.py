"""`diffc slim`: a copy of an artifact with what a deployment needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.artifact.folder import OPTIONAL, Artifact, save_manifest, staging
from diffc.backends.target import RUNTIMES, named_target
from diffc.commands.package.copying import copy_file
from diffc.errors import DiffcError
from diffc.paths import AnyPath, Converted, as_numbers, as_path, as_texts

_DATA = ".onnx_data"


@dataclass(frozen=True)
class SlimRequest:
    """What to copy where. `targets`: runtime targets, none for all; `sms`: engines of these GPUs, none for all."""

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    output: Converted[AnyPath, Path] = Converted(as_path)
    targets: Converted[str | Iterable[str], tuple[str, ...]] = Converted(as_texts, ())
    sms: Converted[int | Iterable[int], tuple[int, ...]] = Converted(as_numbers, ())
    force: bool = False


def slim(request: SlimRequest) -> Artifact:
    """Copy the files that the targets run, and hash them; the manifest of the copy names what was left out.

    Raises DiffcError when the artifact has nothing for a target or a GPU, when `output` may not be written, or when a
    file was changed after the compile.
    """
    artifact = Artifact.load(request.artifact)
    kept = kept_files(artifact, request.targets, request.sms)
    with staging(request.output, force=request.force) as folder:
        for name in kept:
            copy_file(artifact.folder / name, folder / name)
        left_out = sorted(set(artifact.manifest["files"]) - set(kept))
        save_manifest(folder, {**artifact.manifest, "left_out": left_out})
        Artifact.load(folder).verify()
    return Artifact.load(request.output)


def kept_files(artifact: Artifact, targets: Sequence[str], sms: Sequence[int]) -> list[str]:
    """The files that `targets` run on GPUs of `sms`, sorted; without targets, all that any target runs.

    Raises DiffcError for a target or a GPU for which the artifact has nothing.
    """
    engines = [e for e in artifact.engines if not sms or not e["sms"] or set(e["sms"]) & set(sms)]
    built = {sm for engine in engines for sm in engine["sms"]}
    if lacking := [sm for sm in sms if sm not in built]:
        raise DiffcError(
            f"{artifact.folder} has no engine for SM{lacking[0]}", fix=f"compile with --sm {lacking[0]}"
        )
    if targets:
        names = {name for target in targets for name in _files(artifact, target, engines)}
    else:
        other = (name for name in artifact.manifest["files"] if not name.startswith(OPTIONAL))
        names = {*other, *(name for engine in engines for name in _engine_files(artifact, engine))}
    return sorted(names - set(artifact.missing))


def _files(artifact: Artifact, target: str, engines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the runtime `target` opens: its graphs with their weights, or its engines."""
    runtime, compiled = named_target("target", target, RUNTIMES), artifact.manifest["targets"]
    if runtime.file_of not in compiled:
        raise DiffcError(
            f"{artifact.folder} was compiled for {', '.join(compiled)}, not for {target}",
            fix=f"compile with --target {runtime.file_of}",
        )
    if not runtime.is_engine:
        cached = artifact.manifest.get("cache", {}).get("models", ())
        yield artifact.present(compiled[runtime.file_of]).name
        yield from (model["files"][runtime.file_of] for model in cached)
        slotted = artifact.manifest.get("lora_slots", {}).get("files", {})
        yield from (name for of, name in slotted.items() if of == target)
        yield from _data(artifact)
        return
    mine = [engine for engine in engines if engine["target"] == target]
    if not mine:
        raise DiffcError(
            f"{artifact.folder} has no {target} engine here", fix="name another --target or --sm"
        )
    for engine in mine:
        yield from _engine_files(artifact, engine)


def _engine_files(artifact: Artifact, engine: Mapping[str, Any]) -> Iterator[str]:
    """An engine, its copy for ONNX Runtime, and the weights of one that was built without."""
    yield engine["file"]
    context = engine["file"].removesuffix(".engine") + "_ctx.onnx"
    if context in artifact.manifest["files"]:
        yield context
    if "weights" in engine:
        yield engine["weights"]
        yield from _data(artifact)


def _data(artifact: Artifact) -> list[str]:
    """The files of weights, which all graphs share."""
    return [name for name in artifact.manifest["files"] if name.endswith(_DATA)]
