"""`diffc inspect`: what an artifact or a model is, as values to print."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.errors import DiffcError
from diffc.models.profiles import default_profile
from diffc.models.registry import find_spec
from diffc.models.sources.locate import ModelSource, locate
from passes.weights.sources import safetensors_source


@dataclass(frozen=True)
class InspectedModel:
    """A model that can be compiled: `parameters` of the backbone, `nbytes` as stored, and the default profile."""

    source: ModelSource
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    profile: Any


def inspect(what: str) -> Artifact | InspectedModel:
    """The artifact or model. Raises DiffcError when `what` is neither."""
    folder = Path(what).expanduser()
    if (folder / MANIFEST).is_file():
        return Artifact.load(folder)
    try:
        return inspect_model(locate(what))
    except DiffcError as error:
        raise DiffcError(
            f"{what} is not an artifact, and not a model: {error.what}", fix=error.fix
        ) from error


def inspect_model(source: ModelSource) -> InspectedModel:
    """What the headers of the weights and config.json say; no weight is read."""
    import onnx

    tensors = [safetensors_source(file, key) for key, file in source.weights.items()]
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        name = onnx.TensorProto.DataType.Name(tensor.dtype).lower()
        dtypes[name] = dtypes.get(name, 0) + 1
    spec = find_spec(source.family)
    return InspectedModel(
        source,
        sum(math.prod(tensor.shape) for tensor in tensors),
        sum(tensor.nbytes for tensor in tensors),
        dtypes,
        default_profile(spec, source.config),
    )


def next_command(artifact: Artifact) -> str:
    """The command that a user most likely wants after a compile."""
    folder = str(artifact.folder)
    model = artifact.manifest.get("request", {}).get("model")
    try:
        paints = model is not None and locate(model).pipeline_dir is not None
    except DiffcError:
        paints = False
    if paints:
        return shlex.join(["diffc", "generate", folder, "--prompt", "a red fox", "-o", "fox.png"])
    return shlex.join(["diffc", "inspect", folder])
