"""The model that an artifact was compiled from: where it lay, whether it is there still, and whether it is the same."""

from __future__ import annotations

from pathlib import Path

from diffc.artifact.folder import Artifact
from diffc.errors import DiffcError
from diffc.models.embedded.catalogue import EMBEDDED
from diffc.models.sources.locate import ModelSource, locate, locate_base
from diffc.models.sources.loras import with_recorded_loras
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.quantize.formats import STORED


def remembered(model: str) -> str:
    """What a manifest keeps of MODEL of the command line: a file or folder as an absolute path, a name as it is."""
    place = Path(model).expanduser()
    return model if model in EMBEDDED or not place.exists() else str(place.absolute())


def _as_compiled(source: ModelSource, artifact: Artifact) -> ModelSource:
    """The source with the values that the compile took: those of its codes where it kept them."""
    return source.as_held() if artifact.manifest["format"] == STORED.name else source


def compiled_model(
    artifact: Artifact, given: str | None, option: str, hub: HubOptions = DEFAULT_HUB
) -> ModelSource:
    """The model at `given`; None for where the compile found it. `option` is the command's way to name another place.

    `hub` says which files of it are read; where the compile found it, in the place of what the compile said.

    Raises DiffcError when no model is there. Where the compile found it, it must also have the weights of the compile:
    another model may lie there by now.
    """
    if given is not None:
        try:
            found = _as_compiled(locate(given, hub), artifact)
        except DiffcError as error:
            raise DiffcError(error.what, fix=f"name the folder of the model: {option}") from error
        return with_recorded_loras(found, artifact.manifest)
    model = artifact.manifest["request"]["model"]
    if "object" in artifact.manifest["model"]:
        raise DiffcError(
            f"{artifact.folder} was compiled from a {model}",
            fix=f"save that with save_pretrained, and say where it lies: {option}",
        )
    check_there(artifact, option)
    try:
        base = locate_base(artifact.manifest, hub)
    except DiffcError as error:
        raise DiffcError(
            f"{artifact.folder} was compiled from {model}, and the model cannot be read there now: {error.what}",
            fix=f"say where it lies now: {option}",
        ) from error
    source = _as_compiled(with_recorded_loras(base, artifact.manifest), artifact)
    weights = artifact.manifest["model"].get("fingerprint")  # artifacts of older versions have none
    if weights is not None and weights != source.fingerprint:
        raise DiffcError(
            f"{model} is another model than the one that {artifact.folder} was compiled from: its weights differ",
            fix=f"say where the model of the compile lies now: {option}, or compile again",
        )
    return source


def check_there(artifact: Artifact, option: str) -> None:
    """Raise DiffcError where the file or folder that an artifact was compiled from is gone, as after a move.

    `option` is the command's way to name another place.
    """
    model = artifact.manifest["request"]["model"]
    if Path(model).is_absolute() and not Path(model).exists():
        raise DiffcError(
            f"{artifact.folder} was compiled from {model}, which is not there now",
            fix=f"say where the model lies now: {option}",
        )
