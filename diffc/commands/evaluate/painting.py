"""Paints what `diffc evaluate` judges: a picture of every prompt by every artifact, and by the uncompiled pipeline."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.commands.generate import TORCH, GenerateRequest, run_pipeline, sized, variants
from diffc.commands.pipeline_of import pipeline_around, pipeline_source
from diffc.errors import DiffcError, UnsupportedError, UsageError
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.progress import Reporter, Update
from diffc.quality.pictures import save_png, to_image
from diffc.records import read_record
from diffc.runtime.load import resolve
from diffc.runtime.module import CompiledBackbone
from passes.files.atomic import write_text

PICTURES, SETTINGS = "pictures.json", "settings.json"
"""What the folder of pictures holds beside them: what `diffc evaluate --data-path` reads, and how they were painted."""


@dataclass(frozen=True)
class Painting:
    """What is painted: a picture of each of `prompts` by each of `artifacts`, and by `torch`, the uncompiled backbone.

    Prompt n starts from noise of the seed `seed` + n, whoever paints. Sizes are in pixels; None leaves a setting to the
    pipeline. All artifacts are of one family, and run in the `pipeline` of the first, or the one that is given.
    """

    artifacts: tuple[Path, ...]
    prompts: tuple[str, ...]
    torch: bool = True
    steps: int = 25
    seed: int = 0
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    pipeline: str | None = None
    target: str | None = None
    device: str | None = None
    hub: HubOptions = DEFAULT_HUB

    @property
    def names(self) -> list[str]:
        """What the variants are called: torch, and the folders of the artifacts."""
        count = Counter(path.name for path in self.artifacts)
        folders = [path.name if count[path.name] == 1 else str(path) for path in self.artifacts]
        return [*([TORCH] if self.torch else []), *folders]

    def check(self) -> None:
        """Raises UsageError for nothing to paint, or one thing twice."""
        if not self.artifacts or not self.prompts:
            raise UsageError("there is nothing to paint", fix="give artifacts, and --prompts-file FILE")
        if len(set(self.names)) < len(self.names):
            raise UsageError("an artifact is given twice, or is called torch", fix="give each once")


def paint(painting: Painting, folder: Path, ui: Reporter) -> Path:
    """Paint into `folder`; the JSON file that `read_entries` takes. What an equal call has painted there stays.

    Raises DiffcError for artifacts that do not go together, and for a folder with anything else.
    """
    painting.check()
    artifacts = [Artifact.load(path) for path in painting.artifacts]
    first = artifacts[0]
    source = pipeline_source(first, painting.pipeline, painting.hub)
    if source.family.frames is not None:
        raise UnsupportedError("this model paints videos, and pictures are judged", fix="use diffc generate")
    _, device = resolve(first, painting.target, painting.device)
    settings = _settings(painting, artifacts)
    _take_up(folder, settings)
    with ui.stage("load the pipeline") as update:
        pipe = pipeline_around(source, first, device, update, with_backbone=painting.torch)
    request = sized(_request(painting, folder), pipe, source, first.manifest)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / SETTINGS, json.dumps(settings, indent=1) + "\n")
    folders = list(painting.artifacts)
    for number, (_, backbone) in enumerate(variants(folders, painting.torch, pipe, source, request)):
        setattr(pipe, source.family.component, backbone)
        with ui.stage(f"{painting.names[number]} paints {len(painting.prompts)} prompts") as update:
            _paint_all(pipe, backbone, request, painting, _files(painting, folder, number), update)
        _close(pipe, backbone, source, first)
    entries = [
        {"prompt": prompt, "images": {name: _name(n, at) for n, name in enumerate(painting.names)}}
        for at, prompt in enumerate(painting.prompts)
    ]
    write_text(folder / PICTURES, json.dumps(entries, indent=1) + "\n")
    return folder / PICTURES


def _request(painting: Painting, folder: Path) -> GenerateRequest:
    return GenerateRequest(
        painting.artifacts[0],
        folder,
        "",
        negative_prompt=painting.negative_prompt,
        steps=painting.steps,
        seed=painting.seed,
        height=painting.height,
        width=painting.width,
        guidance=painting.guidance,
        target=painting.target,
    )


def _settings(painting: Painting, artifacts: Sequence[Artifact]) -> dict[str, Any]:
    """What the pictures depend on, as JSON: an artifact counts by its manifest."""
    manifests = [hashlib.sha256((a.folder / MANIFEST).read_bytes()).hexdigest() for a in artifacts]
    plain = {**asdict(painting), "hub": "", "artifacts": manifests, "names": painting.names}
    made: dict[str, Any] = json.loads(json.dumps(plain))
    return made


def _take_up(folder: Path, settings: dict[str, Any]) -> None:
    """Raise DiffcError where a folder holds anything but pictures of these settings."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    fix = "give a new folder"
    if not (folder / SETTINGS).is_file():
        raise DiffcError(f"{folder} holds something else than pictures to judge", fix=fix)
    if read_record(folder / SETTINGS, fix=fix) != settings:
        raise DiffcError(f"{folder} holds pictures of other prompts, artifacts or settings", fix=fix)


def _files(painting: Painting, folder: Path, number: int) -> Iterator[Path]:
    return (folder / _name(number, at) for at in range(len(painting.prompts)))


def _name(variant: int, prompt: int) -> str:
    """The file of a picture, relative to the folder; names of artifacts may be no names of files."""
    return f"{variant}/{prompt:05}.png"


def _paint_all(
    pipe: Any,
    backbone: Any,
    request: GenerateRequest,
    painting: Painting,
    files: Iterator[Path],
    update: Update,
) -> None:
    """Paint the pictures of one variant that are not there. Raises DiffcError for one with NaN."""
    for number, (prompt, file) in enumerate(zip(painting.prompts, files, strict=True)):
        if not file.is_file():
            asked = replace(request, prompt=prompt, seed=painting.seed + number)
            images, _ = run_pipeline(pipe, backbone, asked, lambda done, total: None)
            if not torch.isfinite(images).all():
                raise DiffcError(
                    f"{prompt!r} became NaN", fix="compile again with --dtype bfloat16 or float32"
                )
            file.parent.mkdir(exist_ok=True)
            save_png(to_image(images[0]), file)
        update(number + 1, len(painting.prompts))


def _close(pipe: Any, backbone: Any, source: ModelSource, artifact: Artifact) -> None:
    """Let the sessions of a compiled variant go, before the next one takes its memory."""
    if isinstance(backbone, CompiledBackbone):
        for module in (backbone, *(getattr(pipe, name) for name in artifact.manifest.get("experts", ()))):
            module.close()
    setattr(pipe, source.family.component, None)
