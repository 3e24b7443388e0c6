"""`diffc package --layout optimum`: the folder that optimum-onnx's ORT pipelines load as it is.

Every component is a folder with model.onnx and config.json; the VAE is two; tokenizers, scheduler and model_index.json
are the pipeline's. The backbone is the artifact's model over the same file of weights, its inputs and outputs cast
where optimum feeds another type (`backbone_types`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx

from diffc.artifact.describe import is_imported
from diffc.artifact.files import listed
from diffc.artifact.folder import Artifact, write_manifest
from diffc.commands.package.copying import check_tree, copy_file, copy_tree
from diffc.commands.package.export import check, write
from diffc.commands.package.graphs import component_graphs
from diffc.commands.package.parts import Parts, find_parts
from diffc.commands.package.request import Packaged, PackageRequest, described, external_files, model_file
from diffc.commands.package.tokenizers import loadable_class, rewrite_config
from diffc.errors import UnsupportedError, unknown_value
from diffc.models.registry import family_of_manifest
from diffc.models.spec import Shape
from diffc.progress import Reporter
from passes import Pipeline
from passes.graph.onnx_reader import read_proto
from passes.targets.ort.cast_io import CastIo
from passes.targets.ort.guard_slices import GuardSlices


def prepare(artifact: Artifact, request: PackageRequest) -> Callable[[Path, Reporter], Packaged]:
    """What writes the package. Raises DiffcError for an artifact of which optimum-onnx has no pipeline."""
    if request.dtype not in ("float16", "float32"):
        raise unknown_value("type", request.dtype, ("float16", "float32"), fix="optimum feeds no other")
    name = artifact.manifest["model"].get("family")
    if name is None or is_imported(artifact):
        raise UnsupportedError(
            f"{request.artifact} was compiled from an .onnx file, which does not say what its pipeline is",
            fix="compile the diffusers pipeline",
        )
    family = family_of_manifest(artifact.manifest["model"])
    optimum = family.optimum
    if optimum is None:
        raise UnsupportedError(
            f"optimum-onnx has no pipeline for {family}", fix="load the artifact with diffc.load"
        )
    file = listed(artifact.folder, artifact.manifest, model_file(artifact, request.target))
    parts = find_parts(artifact, request.components, request.pipeline, request.hub)

    def write_package(folder: Path, ui: Reporter) -> Packaged:
        with ui.stage("backbone"):
            backbone(artifact, file, folder / family.component, optimum.types)
        errors = dict(_components(parts, request, folder, ui))
        _rest(parts, folder)
        _index(parts, folder)
        write_manifest(folder, _content(artifact, request), {})
        how = f"{optimum.pipeline}.from_pretrained({str(request.output)!r})"
        return Packaged(request.output, how, optimum.pipeline, errors)

    return write_package


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
    spec, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    ranges = {"min": "minimum", "opt": "optimum", "max": "maximum"}
    return {
        "input_shapes": {
            key: spec.input_shapes(config, Shape(**manifest["profile"][name])) for key, name in ranges.items()
        },
        "components": {"dtype": request.dtype, "taken": request.components is not None},
        **described(artifact, request.layout),
    }
