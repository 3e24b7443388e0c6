"""`diffc inspect`: what an artifact or a model is."""

from __future__ import annotations

import shlex
from pathlib import Path

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import MANIFEST, Artifact
from diffc.errors import DiffcError
from diffc.models.sources.locate import ModelSource, locate, locate_again

_PROMPT = ("--prompt", "a red fox", "-o", "fox.png")


def inspect(what: str) -> Artifact | ModelSource:
    """The artifact or model that `what` names; no weight is read. Raises DiffcError when it is neither."""
    folder = Path(what).expanduser()
    if (folder / MANIFEST).is_file():
        return Artifact.load(folder)
    try:
        return locate(what)
    except DiffcError as error:
        raise DiffcError(
            f"{what} is not an artifact, and not a model: {error.what}", fix=error.fix
        ) from error


def next_command(artifact: Artifact) -> str:
    """The command that a user most likely wants after a compile: a picture where there is a pipeline."""
    folder = str(artifact.folder)
    model = artifact.manifest.get("request", {}).get("model")
    try:
        paints = model is not None and locate_again(artifact.manifest).pipeline_dir is not None
    except DiffcError:
        paints = False
    if paints:
        return shlex.join(["diffc", "generate", folder, *_PROMPT])
    if is_imported(artifact) and "family" in artifact.manifest["model"]:
        return shlex.join(["diffc", "generate", folder, "--pipeline", "DIR", *_PROMPT])
    return shlex.join(["diffc", "inspect", folder])
