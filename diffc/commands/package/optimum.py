"""`diffc package --layout optimum`: the folder that optimum-onnx's ORT pipelines load as it is.

Every component is a folder with model.onnx and config.json; the VAE is two; tokenizers, scheduler and model_index.json
are the pipeline's. The backbone is the artifact's model over the same file of weights, its inputs and outputs cast
where optimum feeds another type (`backbone_types`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from diffc.artifact.describe import is_imported
from diffc.artifact.files import listed
from diffc.artifact.folder import MANIFEST, Artifact, check_output, staging, write_manifest
from diffc.commands.package.copying import check_tree, copy_file, copy_tree
from diffc.commands.package.export import check, write
from diffc.commands.package.graphs import component_graphs
from diffc.commands.package.parts import Parts, find_parts
from diffc.commands.package.tokenizers import loadable_class, rewrite_config
from diffc.errors import DiffcError, UnsupportedError, unknown_value
from diffc.models.registry import family_of_manifest
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.models.spec import Shape
from diffc.paths import AnyPath, Converted, as_path, as_path_or_none, as_text_or_none
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.records import read_record
from passes import Pipeline
from passes.graph.onnx_reader import all_tensors, read_proto
from passes.targets.ort.cast_io import CastIo
from passes.targets.ort.guard_slices import GuardSlices

LAYOUTS = ("optimum",)
_ORT_TARGETS = ("ort", "ort-cuda", "ort-trt-rtx", "trt-rtx")


@dataclass(frozen=True)
class PackageRequest:
    """What to package: `artifact` into `output`.

    `components` is a folder of `optimum-cli export onnx` to take everything but the backbone from; without it text
    encoders and VAE are exported from the pipeline folder (`pipeline`, or the one that was compiled) in `dtype`.
    `target` says whose model of the artifact is taken, by default the first that ONNX Runtime runs.
    `hub` says which files of the pipeline are read.
    """

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    output: Converted[AnyPath, Path] = Converted(as_path)
    layout: str = "optimum"
    components: Converted[AnyPath | None, Path | None] = Converted(as_path_or_none, None)
    pipeline: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    target: str | None = None
    dtype: str = "float16"
    skip_validation: bool = False
    force: bool = False
    hub: HubOptions = DEFAULT_HUB


@dataclass(frozen=True)
class Packaged:
    """The finished folder, the class that loads it, and the error of each exported component against torch."""

    folder: Path
    pipeline_class: str
    errors: Mapping[str, float]


def package(request: PackageRequest, ui: Reporter | None = None) -> Packaged:
    """Write the folder. Raises DiffcError for what the user can fix, MismatchError for a component that differs."""
    ui = ui or default_reporter()
    if request.layout not in LAYOUTS:
        raise unknown_value("layout", request.layout, LAYOUTS)
    if request.dtype not in ("float16", "float32"):
        raise unknown_value("type", request.dtype, ("float16", "float32"), fix="optimum feeds no other")
    check_place(request)
    artifact = Artifact.load(request.artifact)
    artifact.verify()
    name = artifact.manifest["model"].get("family")
    if name is None or is_imported(artifact):
        raise UnsupportedError(
            f"{request.artifact} was compiled from an .onnx file, which does not say what its pipeline is",
            fix="compile the diffusers pipeline",
        )
    family = family_of_manifest(artifact.manifest["model"])
    if family.optimum is None:
        raise UnsupportedError(
            f"optimum-onnx has no pipeline for {family}", fix="load the artifact with diffc.load"
        )
    file = listed(artifact.folder, artifact.manifest, model_file(artifact, request.target))
    parts = find_parts(artifact, request.components, request.pipeline, request.hub)
    with staging(request.output, force=request.force) as folder:
        with ui.stage("backbone"):
            backbone(artifact, file, folder / family.component, family.optimum.types)
        errors = dict(_components(parts, request, folder, ui))
        _rest(parts, folder)
        _index(parts, folder)
        write_manifest(folder, _content(artifact, request), {})
    return Packaged(request.output, family.optimum.pipeline, errors)


def check_place(request: PackageRequest) -> None:
    """Raise DiffcError where the output is the artifact, another artifact, or (without `force`) is there at all."""
    if request.output.resolve() == request.artifact.resolve():
        raise DiffcError(f"{request.output} is the artifact", fix="choose another -o")
    check_output(request.output, force=request.force)
    manifest = request.output / MANIFEST
    if manifest.is_file() and "package" not in read_record(manifest, fix="choose another -o"):
        raise DiffcError(f"{request.output} is an artifact, no package", fix="choose another -o")


def model_file(artifact: Artifact, target: str | None) -> str:
    """The artifact's .onnx file for `target`, or for the first target whose file ONNX Runtime runs."""
    files: Mapping[str, str] = artifact.manifest["targets"]
    found = [name for name in ([target] if target else _ORT_TARGETS) if name in files]
    if not found:
        known = ", ".join(files)
        raise DiffcError(
            f"{artifact.folder} has no model for {target or 'ONNX Runtime'}; it was compiled for {known}",
            fix=f"compile with --target {target or 'ort'}",
        )
    return files[found[0]]


def backbone(artifact: Artifact, file: Path, folder: Path, fed: Mapping[str, str]) -> None:
    """model.onnx with the types that optimum feeds, config.json, and the artifact's weights.

    Only the graph is rewritten: the file of weights is copied as it is. A hard link would save the room, but onnx.load
    takes a file of weights with two names for an attack, in the package and in the artifact.
    """
    folder.mkdir()
    model = read_proto(file)
    taken = {name: listed(artifact.folder, artifact.manifest, name) for name in sorted(external_files(model))}
    # optimum opens sessions with ONNX Runtime's default optimizations, which need the guard: the graph of target ort
    # has it, that of ort-cuda has not.
    model = Pipeline([CastIo(backbone_types(model, fed)), GuardSlices()]).run(model).model
    onnx.save(model, folder / "model.onnx")
    for name, source in taken.items():
        copy_file(source, folder / name)
    config = json.dumps(artifact.manifest["model"]["config"], indent=2)
    (folder / "config.json").write_text(config, encoding="utf-8")


def backbone_types(model: onnx.ModelProto, fed: Mapping[str, str]) -> tuple[str, ...]:
    """The casts that the optimum layout asks of a backbone, as `cast-io` takes them.

    `fed` are the types that optimum feeds where they are not the graph's own (`Optimum.types`). bfloat16, for which
    optimum has no type, is float32 outside. Everything else fits as it is: optimum casts what it feeds to the types
    that a graph declares.
    """
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}
    asked = {name: onnx.TensorProto.DataType.Value(kind.upper()) for name, kind in fed.items()}
    ids = [f"{name}:{fed[name]}" for name, kind in asked.items() if types.get(name) not in (None, kind)]
    narrow = [f"{name}:float32" for name, kind in types.items() if kind == onnx.TensorProto.BFLOAT16]
    return (*ids, *narrow)


def external_files(model: onnx.ModelProto) -> set[str]:
    """Names of the files that hold weights of the model."""
    held = (t for t in all_tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)
    return {entry.value for tensor in held for entry in tensor.external_data if entry.key == "location"}


def _components(
    parts: Parts, request: PackageRequest, folder: Path, ui: Reporter
) -> Iterator[tuple[str, float]]:
    """Write the text encoders' and the VAE's graphs; gives the errors of those that were exported here."""
    for name in parts.exported:
        with ui.stage(f"take {name}"):
            copy_tree(parts.folder, name, folder)
            for file in (folder / name).rglob("*.onnx"):
                read_proto(file)  # which refuses weights that lie elsewhere
    if not parts.graphs:
        return

    for name, kind in parts.graphs.items():
        check_tree(parts.folder, name)
        with ui.stage(f"export {name}"):
            for graph in component_graphs(parts.folder, name, kind, request.dtype, parts.variant):
                write(graph, folder / graph.name)
                if not request.skip_validation:
                    yield graph.name, check(graph, folder / graph.name / "model.onnx")


def _rest(parts: Parts, folder: Path) -> None:
    """Tokenizers, the scheduler: folders that are taken as they are."""
    for name in parts.taken:
        copy_tree(parts.folder, name, folder)


def _index(parts: Parts, folder: Path) -> None:
    """model_index.json, with tokenizers that transformers 4 loads from the files that are there."""
    index = dict(parts.index)
    for name, entry in parts.index.items():
        if name in parts.taken and name.startswith("tokenizer") and entry[0] is not None:
            rewrite_config(folder / name)
            index[name] = [entry[0], loadable_class(folder / name, entry[1])]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _content(artifact: Artifact, request: PackageRequest) -> dict[str, Any]:
    """What diffc says of a package in its manifest, so that --force replaces packages only."""
    manifest = artifact.manifest
    kept = ("diffc", "versions", "model", "format", "dtype", "profile")
    spec, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    ranges = {"min": "minimum", "opt": "optimum", "max": "maximum"}
    return {
        "package": request.layout,
        "input_shapes": {
            key: spec.input_shapes(config, Shape(**manifest["profile"][name])) for key, name in ranges.items()
        },
        "components": {"dtype": request.dtype, "taken": request.components is not None},
        **{key: manifest[key] for key in kept if key in manifest},
    }
