"""The pipeline that `diffc cache search` measures, in float32 on the CPU or the stored type on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffc.models.sources.backbone import quiet_libraries
from diffc.models.sources.components import check_components
from diffc.models.sources.locate import locate
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.loras import with_loras
from diffc.models.sources.pipelines import open_pipeline, pipeline_seconds
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.progress import Reporter, estimated

DEFAULT_PROMPTS = ("a handwritten seven", "a red fox asleep in fresh snow", "a wooden sign that reads OPEN")


def load_for_search(
    model: str,
    ui: Reporter,
    hub: HubOptions = DEFAULT_HUB,
    loras: Sequence[LoraSpec] = (),
    *,
    partial: bool = False,
) -> Any:
    """The diffusers pipeline of `model` with `loras` in its backbone.

    Raises DiffcError when there is none, or it does not load.
    """
    import torch

    source = with_loras(locate(model, hub), loras, hub, partial=partial)
    check_components(source)
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, source.dtype) if cuda else torch.float32
    with (
        ui.stage("load the pipeline") as update,
        quiet_libraries(),
        estimated(update, pipeline_seconds(source)),
    ):
        pipe = open_pipeline(source, dtype=dtype, fix="download the whole pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if cuda else "cpu")
