"""Opens the diffusers pipeline of a model: offline, safetensors only, one message when it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from diffc.errors import DiffcError
from diffc.models.single.encoders import put_into
from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.components import backbone_file, check_components, component_variant, components_of
from diffc.models.sources.json_files import read_json
from diffc.models.sources.source import ModelSource


def open_pipeline(source: ModelSource, *, dtype: Any, fix: str, **components: Any) -> Any:
    """The pipeline around a backbone, its weights in `dtype` (a torch type, or a dict of them by component).

    `components` replace those in the folder; None leaves one out, and so does null in model_index.json. Raises
    DiffcError when the source is a backbone without a pipeline, when a component is missing, or when diffusers cannot
    load the pipeline; `fix` then says what to do.
    """
    check_components(source, without=components)
    folder = source.pipeline_dir
    assert folder is not None  # check_components refuses a backbone alone
    present, absent = components_of(folder)
    used = [component_variant(folder / name, source.variant) for name in present if name not in components]
    given = dict.fromkeys(absent) | _unreadable_backbone(source, dtype, components) | components
    try:
        pipe = pipeline_class(folder).from_pretrained(
            folder,
            dtype=dtype,
            variant=source.variant if source.variant in used else None,
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    except (DiffcError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # diffusers, transformers and safetensors raise what a damaged file leads them to
        said = f"{type(error).__name__}: {str(error)[:1000]}"
        raise DiffcError(f"diffusers cannot load the pipeline in {folder}: {said}", fix=fix) from error
    modules = {name: part for name, part in given.items() if isinstance(part, nn.Module)}
    if lost := [name for name, part in modules.items() if getattr(pipe, name, None) is not part]:
        raise RuntimeError(f"{type(pipe).__name__} did not take the {', '.join(lost)} that it was given")
    if source.beside:
        put_into(pipe, source.beside, source.path)
    return pipe


def pipeline_class(folder: Path) -> Any:
    """The diffusers class of the pipeline in a folder.

    `DiffusionPipeline.from_pretrained` is not told which components the class can do without (diffusers 0.42), and
    loads one of these from its files although another is given: WAN's transformers, for instance.
    """
    import diffusers

    cls = getattr(diffusers, str(read_json(folder / "model_index.json").get("_class_name")), None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)
    return cls if known else diffusers.DiffusionPipeline


def _unreadable_backbone(source: ModelSource, dtype: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The backbone, loaded here, where diffusers does not read the names of its files, or LoRAs are in it."""
    inside = source.pipeline_dir in source.path.parents
    component, file = source.path.name if inside else source.family.component, backbone_file(source)
    readable = file is not None and file.spelling in ("", "now") and not source.loras
    if component in components or readable:
        return {}
    if isinstance(dtype, dict):
        dtype = dtype.get(component, dtype["default"])
    return {component: load_backbone(source, dtype)}


def pipeline_seconds(source: ModelSource) -> float:
    """About how long `open_pipeline` takes: the import of diffusers, and the files at 300 MB/s."""
    folder = source.pipeline_dir or source.path
    return 5.0 + sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 3e8
