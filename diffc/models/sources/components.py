"""The components of a pipeline folder: which there are, and whether diffusers finds their files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from diffc.errors import DiffcError
from diffc.models.config_check import check_numbers
from diffc.models.sources.inside import inside
from diffc.models.sources.json_files import components_in, read_index, read_json
from diffc.models.sources.safetensors_files import file_names
from diffc.models.sources.source import ModelSource
from diffc.models.sources.weight_names import WeightFile, choose, common_variant, weight_files

_WHOLE = "download the whole pipeline"


def components_of(pipeline: Path) -> tuple[list[str], list[str]]:
    """The components that model_index.json names: those that have a class, and those that are null."""
    entries = components_in(read_index(pipeline))
    present = [name for name, entry in entries.items() if all(entry)]
    return present, [name for name in entries if name not in present]


def pipeline_variant(pipeline: Path, wanted: str | None = None) -> str | None:
    """The variant to ask diffusers for: `wanted`, or one under which all components have weights, None for plain files.

    Raises DiffcError when no component has files of the variant that is wanted.
    """
    present, _ = components_of(pipeline)
    folders = [file_names(pipeline / name) for name in present if _is_model(pipeline / name)]
    if wanted is None:
        return common_variant(folders)
    check_variant(pipeline, [name for names in folders for name in names], wanted)
    return wanted


def check_variant(folder: Path, names: Iterable[str], wanted: str) -> None:
    """Raise DiffcError unless some of the files `names` are weights of the variant `wanted`."""
    there = {file.variant for file in weight_files(names)}
    if wanted not in there:
        known = ", ".join(sorted(word or "plain files" for word in there)) or "no weights"
        raise DiffcError(
            f"{folder} has no weights of the variant {wanted!r}; it has: {known}",
            fix="give --variant another of these, or leave it out",
        )


def component_variant(folder: Path, variant: str | None) -> str | None:
    """What `from_pretrained` wants for one component: `variant` where the folder has files of it, otherwise None."""
    chosen = choose(file_names(folder), variant)
    return chosen.variant if chosen else None


def check_components(source: ModelSource, *, without: Collection[str] = ()) -> None:
    """Raise DiffcError that names a component of the pipeline without folder or weights that diffusers can read.

    Components in `without` are not looked at, and names of the backbone's files only, since diffc reads more of them
    than diffusers. Reads names, no weights.
    """
    pipeline = source.pipeline_dir
    if source.pipeline is not None:
        return  # a pipeline in memory was loaded by its owner
    if pipeline is None:
        raise DiffcError(
            f"{source.path} is a backbone alone, and this needs the whole pipeline",
            fix="give the folder that has model_index.json",
        )
    present, _ = components_of(pipeline)
    lacking = [name for name in present if not _has_files(inside(pipeline, name))]
    if lacking := [name for name in lacking if name not in without]:
        raise DiffcError(
            f"{pipeline / 'model_index.json'} names {', '.join(lacking)}, and {pipeline} has no such folder",
            fix=f"{_WHOLE}; a component that the pipeline does not need is [null, null] in model_index.json",
        )
    classes = components_in(read_index(pipeline))
    for name in present:
        if name not in without and "Tokenizer" in str(classes[name][1]):
            _check_vocabulary(pipeline / name, str(classes[name][1]))
        if name not in without and _is_model(pipeline / name):
            check_numbers(read_json(inside(pipeline, name) / "config.json"), pipeline / name / "config.json")
            _check_weights(
                pipeline / name,
                source.variant,
                is_backbone=name in (source.path.name, source.family.component),
            )


def backbone_file(source: ModelSource) -> WeightFile | None:
    """The weights of the backbone; None where their name is not one that diffusers writes."""
    return choose(file_names(source.path), source.variant)


def _is_model(folder: Path) -> bool:
    """Whether a component has weights; tokenizers and schedulers have no config.json of this name beside them."""
    return (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file()


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


_VOCABULARY = re.compile(r"tokenizer\.json|tekken\.json|vocab.*|.*\.(model|txt|tiktoken)")


def _check_vocabulary(folder: Path, kind: str) -> None:
    """Raise DiffcError for a tokenizer without words: transformers 5 makes one, and every prompt is unknown to it."""
    if "ByT5" not in kind and not any(_VOCABULARY.fullmatch(file.name) for file in folder.iterdir()):
        raise DiffcError(f"{folder} has no vocabulary: no tokenizer.json, vocab.json or the like", fix=_WHOLE)


def _check_weights(folder: Path, variant: str | None, *, is_backbone: bool) -> None:
    chosen = choose(file_names(folder), variant)
    if chosen is None:
        if is_backbone:
            return
        raise DiffcError(f"{folder} has a config.json and no weights in safetensors", fix=_WHOLE)
    if chosen.variant not in (None, variant):
        raise DiffcError(
            f"{folder} has weights of the variant {chosen.variant!r} only, and other components of {variant!r} only",
            fix="download every component in one variant",
        )
    if chosen.spelling in ("old", "odd") and not is_backbone:
        stem = chosen.name.partition(".")[0]
        new = f"{stem}.safetensors.index.{chosen.variant}.json"
        raise DiffcError(
            f"{folder / chosen.name} has a name that diffusers does not read", fix=f"rename the file to {new}"
        )
