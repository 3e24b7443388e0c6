"""Opens the diffusers pipeline of a model: offline, safetensors only, one message when it cannot be."""

from __future__ import annotations

from typing import Any

from diffc.errors import DiffcError
from diffc.models.sources.source import ModelSource


def open_pipeline(source: ModelSource, *, dtype: Any, fix: str, **components: Any) -> Any:
    """The pipeline around a backbone, its weights in `dtype` (a torch type, or a dict of them by component).

    `components` replace those in the folder; None leaves one out. Raises DiffcError when the source is a backbone
    without a pipeline, or when diffusers cannot load it; `fix` then says what to do.
    """
    from diffusers import DiffusionPipeline

    folder = source.pipeline_dir
    if folder is None:
        raise DiffcError(
            f"{source.path} is a backbone alone, and this needs the whole pipeline",
            fix="give the folder that has model_index.json",
        )
    try:
        return DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **components
        )
    except (OSError, ValueError, ImportError) as error:
        raise DiffcError(f"diffusers cannot load the pipeline in {folder}: {error}", fix=fix) from error


def pipeline_seconds(source: ModelSource) -> float:
    """About how long `open_pipeline` takes: the import of diffusers, and the files at 300 MB/s."""
    folder = source.pipeline_dir or source.path
    return 5.0 + sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 3e8
