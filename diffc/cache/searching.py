"""The pipeline that `diffc cache search` measures: whole, in float32 on the CPU or the stored type on a GPU."""

from __future__ import annotations

from typing import Any

from diffc.errors import DiffcError
from diffc.ui import Reporter

DEFAULT_PROMPTS = ("a handwritten seven", "a red fox asleep in fresh snow", "a wooden sign that reads OPEN")


def load_for_search(model: str, ui: Reporter) -> Any:
    """The diffusers pipeline of `model`. Raises DiffcError when there is none, or it does not load."""
    import torch
    from diffusers import DiffusionPipeline

    from diffc.models.backbone import quiet_libraries
    from diffc.models.locate import locate
    from diffc.plan import stored_dtype

    source = locate(model)
    if source.pipeline_dir is None:
        raise DiffcError(
            f"{source.backbone_dir} is a backbone alone, and a search runs the whole pipeline",
            mend="give the folder that has model_index.json",
        )
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, stored_dtype(source)) if cuda else torch.float32
    with ui.stage("load the pipeline"), quiet_libraries():
        try:
            pipe = DiffusionPipeline.from_pretrained(source.pipeline_dir, dtype=dtype, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            raise DiffcError(
                f"diffusers cannot load the pipeline in {source.pipeline_dir}: {error}",
                mend="download the whole pipeline",
            ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if cuda else "cpu")
