"""The comparisons of a finished artifact: its models, what each is compared with, and at which inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from diffc.artifact.describe import is_imported
from diffc.artifact.files import listed
from diffc.artifact.folder import Artifact
from diffc.artifact.model import compiled_model
from diffc.backends.onnx_graph import compute_type
from diffc.backends.target import RUNTIMES
from diffc.errors import DiffcError, UsageError
from diffc.models.inputs import random_inputs
from diffc.models.profiles import ShapeProfile
from diffc.models.registry import family_of_manifest
from diffc.models.sources.backbone import DTYPES, FakeBackbone, check_weights
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.progress import Update
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import STORED
from diffc.validate.onnx_reference import Draw, GraphReference, draw_by_graph
from diffc.validate.outputs import Session, validate_model, validate_session
from diffc.validate.reports import GraphSizes, ShapeReport, Sizes
from diffc.validate.shapes import fixed_batch, parse_graph_sizes, parse_shape, usual_shapes
from diffc.validate.tolerances import tolerance_of
from diffc.validate.torch_reference import TorchReference
from passes.storage import load

AGAINST = ("torch", "ort")
"""What --against takes beside an artifact or an .onnx file."""


@dataclass(frozen=True)
class Comparison:
    """One model of an artifact with all that comparing it takes.

    `against` names the reference: "torch", "ort", an artifact or an .onnx file. `family` is empty for an artifact that
    was compiled from an ONNX file.
    """

    name: str
    model: onnx.ModelProto
    reference: TorchReference | GraphReference
    format: str
    dtype: str
    shapes: Sequence[Sizes]
    seeds: Sequence[int]
    against: str
    family: str = ""

    def validate_graph(self, seed: int, limit: float | None, update: Update) -> list[ShapeReport]:
        """The graph itself in ONNX Runtime on the CPU; `limit` replaces all tolerances."""
        return validate_model(
            self.model,
            self.reference,
            format=self.format,
            shapes=self.shapes,
            seed=seed,
            limit=limit,
            update=update,
        )

    def validate_session(
        self, name: str, session: Session, seed: int, limit: float | None, update: Update
    ) -> list[ShapeReport]:
        """A runtime that computes what the graph says, called `name` in the reports."""
        return validate_session(
            name,
            self.model,
            session,
            self.reference,
            limit=limit or tolerance_of(self.format, self.dtype),
            shapes=self.shapes,
            seed=seed,
            update=update,
        )


def format_of_graph(model: onnx.ModelProto) -> str:
    """A format that rounds activations as this graph does."""
    weights = {t.name for t in model.graph.initializer}
    rounded = {n.op_type for n in model.graph.node if n.input and n.input[0] not in weights}
    if any(op.startswith("TRT_") and "DynamicQuantize" in op for op in rounded):
        return "nvfp4"
    return "int8" if "QuantizeLinear" in rounded else "none"


def format_and_dtype(artifact: Artifact, model: onnx.ModelProto) -> tuple[str, str]:
    """The format and the compute type, which name the tolerance.

    For an imported graph, and one of stored codes, a format that rounds activations as this graph does.
    """
    manifest = artifact.manifest
    if manifest["format"] == STORED.name:
        return format_of_graph(model), manifest["dtype"]
    if not is_imported(artifact):
        return manifest["format"], manifest["dtype"]
    return format_of_graph(model), compute_type(model)


def shapes_of(
    artifact: Artifact, model: onnx.ModelProto, texts: Sequence[str], target: str = "ort"
) -> Sequence[Sizes]:
    """The shapes that `texts` (values of --shape) name; without any, the two of a compile.

    Raises DiffcError for sizes that the model cannot run, and for those that the engines of `target` do not take.
    """
    manifest = artifact.manifest
    if is_imported(artifact):
        known = _usual_sizes(artifact)
        if known and not texts:
            return known
        wanted = [(text, 2) for text in texts] or [("", 2), ("", 4)]
        return [parse_graph_sizes(text, model, default) for text, default in wanted]
    spec, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    batch = fixed_batch(model)
    profile = ShapeProfile.of_manifest(manifest["profile"])
    usual = usual_shapes(spec, config, batch, profile if manifest["engines"] else None)
    shapes = tuple(parse_shape(text, spec, config, usual[0]) for text in texts) or usual
    if other := next((s for s in shapes if batch not in (None, s.batch)), None):
        raise UsageError(
            f"shape ({other}): {artifact.folder} was compiled for a batch of {batch}",
            fix=f"use --shape batch={batch},..., or compile with --profile batch=min:opt:max",
        )
    outside = next((s for s in shapes if not profile.holds(s)), None)
    if outside is not None and RUNTIMES[target].takes_ranges:
        raise UsageError(
            f"shape ({outside}): {artifact.folder} was compiled for ({profile.minimum}) to ({profile.maximum})",
            fix="choose a --shape inside, leave --target out to run the graph on the CPU, which takes every size, or"
            " compile with a wider --profile",
        )
    return shapes


def _usual_sizes(artifact: Artifact) -> list[GraphSizes]:
    """The two usual shapes as sizes of the dimensions of an imported graph; empty where its family is not known."""
    manifest = artifact.manifest
    if "interface" not in manifest:
        return []
    spec, config = family_of_manifest(manifest["model"]), manifest["model"]["config"]
    dims, fixed = manifest["interface"]["dims"], manifest["interface"]["fixed"]
    profile = ShapeProfile.of_manifest(manifest["profile"]) if manifest["engines"] else None
    sizes = [spec.sizes(shape) for shape in usual_shapes(spec, config, fixed.get("batch"), profile)]
    return [GraphSizes(tuple((name, size[own]) for name, own in dims.items())) for size in sizes]


def graph_reference(
    artifact: Artifact, model: onnx.ModelProto, against: str, format: str, dtype: str
) -> GraphReference:
    """The reference for `--against ort` (the model itself, in float32), an artifact or a file. Close it at the end."""
    other = model if against == "ort" else load(_model_file(Path(against)))
    quantized = against != "ort" and format != "none"
    return GraphReference(other, dtype, _draw(artifact, model, dtype), quantized=quantized)


def _draw(artifact: Artifact, model: onnx.ModelProto, dtype: str) -> Draw:
    if is_imported(artifact):
        return draw_by_graph(model)
    spec = family_of_manifest(artifact.manifest["model"])
    config = artifact.manifest["model"]["config"]

    def draw(shape: Any, seed: int) -> dict[str, torch.Tensor]:
        return random_inputs(spec, config, shape, dtype=DTYPES[dtype], seed=seed)

    return draw


def _model_file(path: Path) -> Path:
    """The model of an artifact, or an .onnx file. Raises DiffcError that says what --against takes."""
    if path.suffix == ".onnx" and path.is_file():
        return path
    if path.is_dir():
        other = Artifact.load(path)
        other.verify()
        return listed(other.folder, other.manifest, "model.onnx")
    raise DiffcError(
        f"{path} is neither an artifact nor an .onnx file, so there is nothing to compare with",
        fix=f"give --against {', '.join(AGAINST)}, an artifact, or an .onnx file",
    )


def torch_reference_of(
    artifact: Artifact, model: str | None = None, hub: HubOptions = DEFAULT_HUB
) -> TorchReference:
    """The fake-quantized torch model that the artifact was compiled from, rebuilt from its manifest.

    `model` is where the torch model lies now, None for where the compile found it. Raises DiffcError when there is no
    model, or another one.
    """
    manifest = artifact.manifest
    source = compiled_model(artifact, model, "--model DIR", hub)
    if _own_entries(source.config) != _own_entries(manifest["model"]["config"]):
        raise DiffcError(
            f"{source.path} is another model than the one that {artifact.folder} was compiled from:"
            " its config.json differs",
            fix="name the model: --model FOLDER",
        )
    backbone = FakeBackbone(source, manifest["dtype"])
    check_weights(backbone)
    return TorchReference(source, manifest["dtype"], _checkpoint(artifact, backbone))


def _own_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without where it was loaded from and by which diffusers it was written."""
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "_diffusers_version")}


def _checkpoint(artifact: Artifact, backbone: FakeBackbone) -> Checkpoint | None:
    """The calibration in the artifact, None for a format without one. Raises DiffcError when the weights differ."""
    folder = artifact.folder / "checkpoint"
    if left_out := next((name for name in artifact.missing if name.startswith("checkpoint/")), None):
        raise DiffcError(
            f"{artifact.folder} has no {left_out}: the calibration was left out of this copy, and without it torch"
            " does not compute what was compiled",
            fix="validate the whole artifact, or compare with its own graph: --against ort",
        )
    if not folder.is_dir():
        return None
    checkpoint = Checkpoint.load(folder)
    source = backbone.source
    checkpoint.check(backbone.module, source.family.name, source.fingerprint_like(checkpoint.source))
    return checkpoint
