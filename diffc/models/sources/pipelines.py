"""Opens the diffusers pipeline of a model: offline, safetensors only, one message when it cannot be."""

from __future__ import annotations

from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.backbone import load_backbone
from diffc.models.sources.components import backbone_file, check_components, component_variant, components_of
from diffc.models.sources.source import ModelSource


def open_pipeline(source: ModelSource, *, dtype: Any, fix: str, **components: Any) -> Any:
    """The pipeline around a backbone, its weights in `dtype` (a torch type, or a dict of them by component).

    `components` replace those in the folder; None leaves one out, and so does null in model_index.json. Raises
    DiffcError when the source is a backbone without a pipeline, when a component is missing, or when diffusers cannot
    load the pipeline; `fix` then says what to do.
    """
    from diffusers import DiffusionPipeline

    check_components(source, without=components)
    folder = source.pipeline_dir
    assert folder is not None  # check_components refuses a backbone alone
    present, absent = components_of(folder)
    used = [component_variant(folder / name, source.variant) for name in present if name not in components]
    given = dict.fromkeys(absent) | _unreadable_backbone(source, dtype, components) | components
    try:
        return DiffusionPipeline.from_pretrained(
            folder,
            dtype=dtype,
            variant=source.variant if source.variant in used else None,
            local_files_only=True,
            use_safetensors=True,
            **given,
        )
    except (OSError, ValueError, ImportError, LookupError) as error:
        raise DiffcError(f"diffusers cannot load the pipeline in {folder}: {error}", fix=fix) from error


def _unreadable_backbone(source: ModelSource, dtype: Any, components: dict[str, Any]) -> dict[str, Any]:
    """The backbone, loaded here, where diffusers does not read the names of its files, or LoRAs are in it."""
    component, file = source.path.name, backbone_file(source)
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
