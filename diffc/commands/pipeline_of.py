"""The diffusers pipeline that an artifact's backbone belongs to, for commands that paint."""

from __future__ import annotations

from typing import Any

import torch

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import Artifact
from diffc.artifact.model import compiled_model
from diffc.errors import DiffcError
from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.pipelines import open_pipeline, pipeline_seconds
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.progress import Update, estimated


def pipeline_source(artifact: Artifact, pipeline: str | None, hub: HubOptions = DEFAULT_HUB) -> ModelSource:
    """The diffusers pipeline of the compile, or the one that is given.

    Raises DiffcError where there is none, or one of another family.
    """
    model = artifact.manifest["model"]
    if "family" not in model:
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file, whose inputs are those of no family that diffc knows",
            fix="compile a diffusers model",
        )
    if pipeline is None and is_imported(artifact):
        raise DiffcError(
            f"{artifact.folder} was compiled from an ONNX file, which says nothing of the pipeline around it",
            fix=f"give the pipeline of that {model['family']} model: --pipeline DIR",
        )
    source = compiled_model(artifact, pipeline, "--pipeline DIR", hub)
    if source.pipeline_dir is None:
        raise DiffcError(
            f"{source.path} is a backbone alone, and painting takes the whole pipeline",
            fix="give --pipeline and the folder that has model_index.json",
        )
    if source.family.name != model["family"]:
        raise DiffcError(
            f"{source.pipeline_dir} is of family {source.family}, the artifact of {model['family']}",
            fix="give the --pipeline that the artifact was compiled from",
        )
    check_components(source, without=(source.family.component, *artifact.manifest.get("experts", ())))
    return source


def pipeline_around(
    source: ModelSource, artifact: Artifact, device: torch.device, update: Update, *, with_backbone: bool
) -> Any:
    """The diffusers pipeline on `device`, in float32 on the CPU; its own backbone is read only if it is needed."""
    dtype = getattr(torch, artifact.manifest["dtype"]) if device.type == "cuda" else torch.float32
    names = (source.family.component, *artifact.manifest.get("experts", ()))
    left_out = {} if with_backbone else dict.fromkeys(names)
    fix = "download the whole pipeline, or give another --pipeline"
    with quiet_libraries(), estimated(update, pipeline_seconds(source)):
        pipe = open_pipeline(source, dtype=dtype, fix=fix, **left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
