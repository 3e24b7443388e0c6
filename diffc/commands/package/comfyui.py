"""`diffc package --layout comfyui`: a custom node of ComfyUI together with the backbone that it loads.

OUTPUT/__init__.py, nodes.py    the node
OUTPUT/artifacts/NAME           the artifact, with what runs it
OUTPUT/sampling.json            what the pipeline's scheduler says of NAME
OUTPUT/pyproject.toml           as ComfyUI's registry asks for
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffc.artifact.folder import Artifact, save_manifest, write_manifest
from diffc.artifact.model import compiled_model
from diffc.backends.target import RUNTIMES, Target, named_target
from diffc.commands.package.copying import copy_file
from diffc.commands.package.request import Packaged, PackageRequest, check_backbone_alone, described
from diffc.commands.slim import kept_files
from diffc.errors import DiffcError, UnsupportedError
from diffc.models.sources.json_files import read_scheduler
from diffc.progress import Reporter
from diffc.runtime.comfyui import ComfyModel, comfy_model
from diffc.version import VERSION

_NODES = Path(__file__).with_name("comfyui_nodes.py")
_INIT = '''"""A backbone compiled by diffc as a node of ComfyUI."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''
_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""diffusers' names of schedules of noise -> those of ComfyUI."""


def prepare(artifact: Artifact, request: PackageRequest) -> Callable[[Path, Reporter], Packaged]:
    """What writes the package. Raises DiffcError for a family that the node does not know."""
    check_backbone_alone(request)
    model, name = comfy_model(artifact), artifact_name(artifact)
    targets = () if request.target is None else (named_target("target", request.target, RUNTIMES),)
    kept = kept_files(artifact, [target.name for target in targets], ())
    scheduler, note = _scheduler(artifact)
    sampling = sampling_of(scheduler, model)

    def write_package(folder: Path, ui: Reporter) -> Packaged:
        with ui.stage("artifact"):
            _copy(artifact, kept, folder / "artifacts" / name)
        copy_file(_NODES, folder / "nodes.py")
        texts = {
            "__init__.py": _INIT,
            "sampling.json": json.dumps({name: sampling}, indent=2) + "\n",
            "pyproject.toml": _project(name, targets),
        }
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        write_manifest(folder, described(artifact, request.layout), {})
        how = f"copy {request.output} to ComfyUI/custom_nodes, and add the node Load diffc backbone"
        notes = (*note, *_notes(artifact, targets))
        return Packaged(request.output, how, notes=notes)

    return write_package


def artifact_name(artifact: Artifact) -> str:
    """The name that the node shows: of what was compiled, and its format."""
    text = f"{artifact.manifest['model']['name']}-{artifact.manifest['format']}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "backbone"


def sampling_of(scheduler: Mapping[str, Any], model: ComfyModel) -> dict[str, Any]:
    """The entries of ComfyUI's sampling settings that a scheduler_config.json tells, and its kind of prediction.

    Raises UnsupportedError for a prediction that ComfyUI has no sampling for.
    """
    if model.model_type == "EPS":
        return _of_noise(scheduler)
    shift = scheduler.get("shift")
    fixed = shift is not None and not scheduler.get("use_dynamic_shifting")
    return {"settings": {"shift": shift}} if fixed and model.base == "SD3" else {}


def _of_noise(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    prediction = scheduler.get("prediction_type", "epsilon")
    kinds = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}
    if prediction not in kinds:
        raise UnsupportedError(
            f"the pipeline's scheduler says prediction_type={prediction!r}, and the node knows {', '.join(kinds)}",
            fix="run it in its diffusers pipeline: diffc.load",
        )
    settings = {
        "beta_schedule": _SCHEDULES.get(scheduler.get("beta_schedule", "")),
        "linear_start": scheduler.get("beta_start"),
        "linear_end": scheduler.get("beta_end"),
        "timesteps": scheduler.get("num_train_timesteps"),
        "zsnr": scheduler.get("rescale_betas_zero_snr"),
    }
    return {
        "model_type": kinds[prediction],
        "settings": {k: v for k, v in settings.items() if v is not None},
    }


def _scheduler(artifact: Artifact) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The scheduler_config.json of the pipeline that was compiled; without it a note, and ComfyUI's values count."""
    note = "the pipeline of the compile is not there: the node samples with ComfyUI's values of this family"
    try:
        pipeline = compiled_model(artifact, None, "--pipeline DIR").pipeline_dir
    except DiffcError:
        return {}, (note,)
    file = None if pipeline is None else pipeline / "scheduler" / "scheduler_config.json"
    if file is None or not file.is_file():
        return {}, (note,)
    return read_scheduler(file), ()


def _copy(artifact: Artifact, kept: list[str], folder: Path) -> None:
    for name in kept:
        copy_file(artifact.folder / name, folder / name)
    left_out = sorted(set(artifact.manifest["files"]) - set(kept))
    save_manifest(folder, {**artifact.manifest, "left_out": left_out})


def _project(name: str, targets: tuple[Target, ...]) -> str:
    """pyproject.toml: what ComfyUI's registry asks for; who publishes the node fills in the last three lines."""
    needed = [f"diffc>={VERSION}", *dict.fromkeys(word for t in targets for word in t.wheels.split())]
    return "\n".join(
        [
            "[project]",
            f'name = "diffc-{name}"',
            f"description = {json.dumps(f'The backbone of {name}, compiled by diffc {VERSION}')}",
            f'version = "{VERSION}"',
            'requires-python = ">=3.11"',
            f"dependencies = {json.dumps(needed)}",
            "",
            "[project.urls]",
            'Repository = ""',
            "",
            "[tool.comfy]",
            'PublisherId = ""',
            f'DisplayName = "diffc {name}"',
            "",
        ]
    )


def _notes(artifact: Artifact, targets: tuple[Target, ...]) -> Iterator[str]:
    wheels = [t.wheels for t in targets if t.wheels]
    more = f", and {wheels[0]}" if wheels else ", and the package of the target that runs it (diffc doctor)"
    yield f"ComfyUI's Python needs diffc{more}"
    yield "LoRA nodes of ComfyUI do not change it: fuse a LoRA with diffc relora"
    if "experts" in artifact.manifest:
        yield "the second backbone of the pipeline is an artifact of its own: package that too"
