"""Reads a model of the Hugging Face hub by its id, from the cache or downloaded: only the files that are needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path, PurePosixPath

from diffc.errors import DiffcError
from diffc.models.registry import family_of
from diffc.models.sources import backbone_folder, pipeline_folder
from diffc.models.sources.backbone_folder import folder_of
from diffc.models.sources.components import check_components, components_of
from diffc.models.sources.hub_cache import is_repository, repository_folder, repository_id, snapshot
from diffc.models.sources.json_files import read_json
from diffc.models.sources.source import HubOptions, ModelSource, Reader
from diffc.models.sources.weight_names import choose, common_variant, of_variant

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".onnx", ".safetensors", ".json", ".pt", ".ckpt", ".bin")
_TEXTS = (".json", ".txt", ".model")
"""Files beside weights: configs, vocabularies, SentencePiece models. Pickles and ONNX files are never taken."""


def reader(options: HubOptions) -> Reader:
    """The reader of hub ids and of their folders in the cache."""
    expects = "an id of the Hugging Face hub (OWNER/NAME)"
    return Reader("Hugging Face hub", expects, _declines, partial(_open, options))


def _declines(model: str) -> str | None:
    folder = folder_of(model)
    if is_repository(folder) or (_ID.fullmatch(model) and not folder.exists() and not model.endswith(_FILES)):
        return None
    return f"{model!r} is not an id OWNER/NAME, nor a folder models--OWNER--NAME of the hub's cache"


def _open(options: HubOptions, model: str) -> ModelSource:
    folder = folder_of(model)
    if is_repository(folder):
        name, cache, offline = repository_id(folder), folder.parent, True
    else:
        name, cache, offline = model, _cache(options), _offline()
    cached = snapshot(repository_folder(cache, name), options.revision)
    if cached is not None and offline:
        return _read(name, cached, options)
    if cached is not None and cached.name == options.revision and (source := _whole(name, cached, options)):
        return source
    if offline:
        raise _not_cached(name, options, "the hub is not asked, since HF_HUB_OFFLINE is set", cache)
    try:
        return _read(name, _download(name, options), options)
    except DiffcError:
        raise
    except Exception as error:  # every kind of network and hub error: the cache answers instead
        if cached is None:
            raise _not_cached(name, options, f"the hub answers: {_short(error)}", cache) from error
        return _read(name, cached, options)


def _read(name: str, folder: Path, options: HubOptions) -> ModelSource:
    """The model in a snapshot folder."""
    for local in (pipeline_folder.reader(options), backbone_folder.reader(options)):
        if local.declines(str(folder)) is None:
            return local.open(str(folder))
    place = f" in {options.subfolder}" if options.subfolder else ""
    raise DiffcError(
        f"{name} has neither model_index.json nor config.json{place} (read: {folder})",
        fix="give --subfolder, or a repository in the layout of diffusers",
    )


def _whole(name: str, folder: Path, options: HubOptions) -> ModelSource | None:
    """The model in a snapshot folder, None when files of it are not in the cache."""
    try:
        source = _read(name, folder, options)
        if source.pipeline_dir is not None:
            check_components(source)
    except DiffcError:
        return None
    return source


def _download(name: str, options: HubOptions) -> Path:
    """The snapshot folder of a model, with every file that is needed. Raises what huggingface_hub raises."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi(token=options.token).model_info(name, revision=options.revision)
    files = [sibling.rfilename for sibling in info.siblings or ()]
    top = PurePosixPath(options.subfolder)
    first = [str(top / file) for file in ("model_index.json", "config.json") if str(top / file) in files]
    fetch = partial(
        snapshot_download, name, revision=options.revision, cache_dir=options.cache_dir, token=options.token
    )
    if not first:
        return Path(fetch(allow_patterns=["model_index.json"]))
    pipeline = Path(fetch(allow_patterns=[escape(file) for file in first])) / options.subfolder
    names = components_of(pipeline)[0] if (pipeline / "model_index.json").is_file() else []
    folders = [str(top / component) for component in names] or [str(top)]
    needed = needed_files(files, folders, options.variant)
    configs = [file for file in needed if PurePosixPath(file).name == "config.json"]
    _check_class(
        Path(fetch(allow_patterns=[escape(file) for file in (*first, *configs)])) / options.subfolder
    )
    return Path(fetch(allow_patterns=[escape(file) for file in (*first, *needed)]))


def _check_class(folder: Path) -> None:
    """Raise UnsupportedError before weights are downloaded: a backbone alone of a class that diffc does not know.

    One with its pipeline is read off the pipeline's own calls.
    """
    if (folder / "model_index.json").is_file():
        pipeline_folder.component(folder)  # raises for a pipeline without a backbone
    elif (folder / "config.json").is_file():
        family_of(read_json(folder / "config.json"), folder / "config.json")


def needed_files(files: Iterable[str], folders: Sequence[str], variant: str | None) -> list[str]:
    """Of the files of a repository, those directly in `folders` that loading takes: weights of one variant, and texts.

    `variant` None is the one that serves all folders, as for a folder on disk.
    """
    found: Mapping[str, list[str]] = {folder: [] for folder in folders}
    for file in files:
        if (parent := str(PurePosixPath(file).parent)) in found:
            found[parent].append(PurePosixPath(file).name)
    variant = variant or common_variant(found.values())
    needed = []
    for folder, names in found.items():
        chosen = choose(names, variant)
        texts = [name for name in names if name.endswith(_TEXTS) and ".index." not in name]
        weights = of_variant(names, chosen) if chosen else [n for n in names if n.endswith(".safetensors")]
        needed += [str(PurePosixPath(folder) / name) for name in (*texts, *weights)]
    return needed


def _cache(options: HubOptions) -> Path:
    from huggingface_hub import constants

    return (options.cache_dir or Path(constants.HF_HUB_CACHE)).expanduser().absolute()


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _not_cached(name: str, options: HubOptions, reason: str, cache: Path) -> DiffcError:
    revision = f" at revision {options.revision}" if options.revision else ""
    return DiffcError(
        f"{name}{revision} is not a folder here and not in the cache {cache}, and {reason}",
        fix="check the id, and --revision; gated and private models need their licence accepted and --token, or"
        " `hf auth login`; without a network, give the folder of a download",
    )


def _short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def pinned(options: HubOptions, source: ModelSource) -> HubOptions:
    """The options that find the files of `source` again from any folder: commit and variant as read, no token."""
    cache = options.cache_dir and options.cache_dir.expanduser().absolute()
    variant = options.variant or source.variant
    return replace(options, revision=source.revision, variant=variant, token=None, cache_dir=cache)
