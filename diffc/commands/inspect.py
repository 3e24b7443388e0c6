"""`diffc inspect`: what an artifact or a model is."""

from __future__ import annotations

import shlex

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import MANIFEST, Artifact
from diffc.errors import DiffcError
from diffc.models.sources.locate import ModelSource, locate, locate_again
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.paths import AnyPath, as_path, as_text

_PROMPT = ("--prompt", "a red fox", "-o", "fox.png")


def inspect(what: AnyPath, hub: HubOptions = DEFAULT_HUB) -> Artifact | ModelSource:
    """The artifact or model that `what` names; no weight is read. Raises DiffcError when it is neither.

    `hub` says which files of a model are read.
    """
    folder = as_path(what)
    if (folder / MANIFEST).is_file():
        return Artifact.load(folder)
    try:
        return locate(as_text(what), hub)
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
