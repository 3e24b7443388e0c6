"""The other backbones of a pipeline that has one for each part of the schedule: WAN 2.2 14B has two.

Such experts are of one class. The pipeline itself switches between them by the time, so each is compiled as a backbone
of its own, calibrated on the steps that the pipeline gives it, and lies in a folder of the artifact named after its
component.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffc.compile.request import CompileRequest
from diffc.errors import UsageError
from diffc.models.sources.json_files import read_json
from diffc.models.sources.source import ModelSource


def experts_of(source: ModelSource) -> tuple[str, ...]:
    """The components of the pipeline of `source` that are of its backbone's class, but for the backbone itself."""
    folder, own = source.pipeline_dir, source.family.component
    if folder is None or not (folder / "model_index.json").is_file():
        return ()
    index = read_json(folder / "model_index.json")
    alike = [
        n for n, entry in index.items() if n != own and isinstance(entry, list) and entry == index.get(own)
    ]
    return tuple(name for name in alike if (folder / name / "config.json").is_file())


def expert_requests(request: CompileRequest, source: ModelSource, folder: Path) -> dict[str, CompileRequest]:
    """What to compile into `folder`/NAME for every expert NAME of the pipeline that `request` names.

    None for a backbone that is asked for by its own folder. Raises UsageError for LoRAs, which are for one expert.
    """
    if request.pipeline is not None:
        return {}
    names, pipeline = experts_of(source), source.pipeline_dir
    if names and request.loras:
        raise UsageError(
            f"this pipeline has several backbones ({source.family.component}, {', '.join(names)}), and --lora does not"
            " say for which it is",
            fix=f"compile each by its folder: MODEL/{names[0]} --pipeline MODEL --lora FILE",
        )
    return {
        name: replace(
            request,
            model=f"{pipeline}/{name}",
            pipeline=str(pipeline),
            hub=replace(request.hub, revision=None, subfolder=""),  # the folder is found already
            output=folder / name,
            save_checkpoint=request.save_checkpoint and request.save_checkpoint / name,
            from_checkpoint=_inside(request.from_checkpoint, name),
            dump=request.dump and request.dump / name,
        )
        for name in names
    }


def _inside(checkpoint: Path | None, name: str) -> Path | None:
    """The checkpoint of an expert: in a folder beside that of the first, or in ModelOpt's folder of all."""
    if checkpoint is not None and (checkpoint / name).is_dir():
        return checkpoint / name
    return checkpoint
