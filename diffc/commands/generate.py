"""`diffc generate`: pictures of an artifact's pipeline with the compiled backbone, beside torch or other artifacts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffc.artifact.describe import is_imported
from diffc.artifact.folder import Artifact
from diffc.commands.pipeline_of import pipeline_around, pipeline_source
from diffc.errors import DiffcError, UsageError
from diffc.models.call import frames_argument, plain_sizes, text_cleaner
from diffc.models.embedded.digits import WORDS
from diffc.models.profiles import ShapeProfile
from diffc.models.sources.locate import ModelSource
from diffc.models.sources.lora_files import LoraSpec
from diffc.models.sources.loras import with_loras
from diffc.models.sources.source import DEFAULT_HUB, HubOptions
from diffc.models.spec import Shape
from diffc.output_files import check_output_file
from diffc.paths import AnyPath, Converted, as_path, as_text_or_none, as_texts
from diffc.progress import Reporter, Update
from diffc.progress_bar import default_reporter
from diffc.quality.classifier import read_digits
from diffc.quality.motion import centred
from diffc.quality.pictures import (
    ANIMATED,
    Column,
    montage,
    psnr,
    save_animation,
    save_png,
    ssim,
    to_image,
)
from diffc.runtime.load import load, resolve
from diffc.runtime.module import CompiledBackbone

TORCH = "torch"
"""What --compare calls the uncompiled pipeline."""
_WARM_UP = 2
"""Denoising steps of a run whose time is not taken."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to paint, and with what; None leaves a setting to the pipeline.

    `compare` holds artifact folders, and "torch" for the uncompiled backbone. Image n of `batch` has the seed
    `seed` + n. `loras` go into the slots of the artifact (`CompiledBackbone.set_lora`) and into torch's backbone.
    `height` and `width` are in pixels, `frames` are those of a video, `pipeline` is the diffusers folder in
    the place of the one of the compile. `warm_up`: every variant paints two steps before its time is taken, since the
    first run of a runtime also allocates and compiles. `hub` says which files of the
    pipeline are read.
    """

    artifact: Converted[AnyPath, Path] = Converted(as_path)
    output: Converted[AnyPath, Path] = Converted(as_path)
    prompt: Converted[str, str] = Converted(str)
    negative_prompt: str | None = None
    compare: Converted[str | Iterable[str], tuple[str, ...]] = Converted(as_texts, ())
    steps: int = 25
    seed: int = 0
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    batch: int = 1
    pipeline: Converted[AnyPath | None, str | None] = Converted(as_text_or_none, None)
    target: str | None = None
    device: str | None = None
    warm_up: bool = True
    frames: int | None = None
    hub: HubOptions = DEFAULT_HUB
    loras: tuple[LoraSpec, ...] = ()


@dataclass(frozen=True)
class Painted:
    """The images [N, 3, H, W] in 0..1 of one variant, the seconds they took, and how they compare.

    Of videos they are the frames, one video after the other.

    `psnr` (dB) and `ssim` are against the first variant, None for itself. `read` holds the digits that the
    classifier reads, empty for models that paint no digits.
    """

    name: str
    images: Tensor
    seconds: float
    psnr: float | None
    ssim: float | None
    read: tuple[int, ...]


def generate(request: GenerateRequest, ui: Reporter | None = None) -> list[Painted]:
    """Paint with every variant and write the picture; torch comes first, since the others are compared with it.

    Raises DiffcError for an artifact, pipeline, size or target that does not fit.
    """
    ui = ui or default_reporter()
    check_output_file(request.output)
    artifact = Artifact.load(request.artifact)
    if request.loras and "lora_slots" not in artifact.manifest:
        raise DiffcError(
            f"{artifact.folder} was compiled without LoRA slots",
            fix="compile with --lora-slots RANK, or fuse the LoRA: diffc relora ARTIFACT --lora FILE",
        )
    source = with_loras(pipeline_source(artifact, request.pipeline, request.hub), request.loras)
    _, device = resolve(artifact, request.target, request.device)
    names = (name for name in dict.fromkeys(request.compare) if name != TORCH)
    folders = [request.artifact, *(Path(name).expanduser().absolute() for name in names)]
    with_torch = TORCH in request.compare
    with ui.stage("load the pipeline") as update:
        pipe = pipeline_around(source, artifact, device, update, with_backbone=with_torch)
    request = sized(request, pipe, source, artifact.manifest)
    painted: list[Painted] = []
    for name, backbone in variants(folders, with_torch, pipe, source, request):
        setattr(pipe, source.family.component, backbone)
        if request.warm_up:
            with ui.stage(f"warm up {name}") as update:
                run_pipeline(pipe, backbone, replace(request, steps=min(_WARM_UP, request.steps)), update)
        with ui.stage(f"paint with {name}") as update:
            images, seconds = run_pipeline(pipe, backbone, request, update)
        painted.append(_judge(name, images, seconds, painted, source))
        if isinstance(backbone, CompiledBackbone):
            for module in (backbone, *(getattr(pipe, name) for name in artifact.manifest.get("experts", ()))):
                module.close()
    if request.output.suffix.lower() in ANIMATED:
        save_animation([to_image(pixels) for pixels in painted[0].images], request.output)
    else:
        save_png(_picture(painted), request.output)
    return painted


def usual_size(manifest: Mapping[str, Any], painted: int | None) -> tuple[int, int]:
    """Height and width of images without --height and --width, in pixels.

    They are `painted`, the size of the pipeline's VAE; None where it tells none. Then, and where the artifact has
    engines that do not take it, they are those of the shape that the engines are best at.
    """
    profile = ShapeProfile.of_manifest(manifest["profile"])
    best = profile.optimum
    if painted is None:
        return best.height, best.width
    fits = profile.holds(replace(best, height=painted, width=painted))
    return (painted, painted) if fits or not manifest["engines"] else (best.height, best.width)


def sized(
    request: GenerateRequest, pipe: Any, source: ModelSource, manifest: Mapping[str, Any]
) -> GenerateRequest:
    """The request with the size of the images. Raises DiffcError for what the model cannot paint."""
    painted = getattr(pipe.vae.config, "sample_size", None) if source.family.interface is None else None
    usual, optimum = usual_size(manifest, painted), ShapeProfile.of_manifest(manifest["profile"]).optimum
    height, width = request.height or usual[0], request.width or usual[1]
    frames = request.frames or optimum.frames
    source.family.check(source.config, Shape(request.batch, height, width, 1, frames))
    if request.negative_prompt is not None and "negative_prompt" not in signature(pipe.__call__).parameters:
        raise UsageError(f"{type(pipe).__name__} takes no negative prompt", fix="leave --negative-prompt out")
    return replace(request, height=height, width=width, frames=frames)


def asked_digit(prompt: str) -> int | None:
    """The digit that a prompt names, in words or as a numeral; None if it names none, or several."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    named = {WORDS.index(w) if w in WORDS else int(w) for w in words if w in WORDS or (w in "0123456789")}
    return named.pop() if len(named) == 1 else None


def verdict(painted: Painted, prompt: str) -> str:
    """What the classifier says of the images; empty for models that paint no digits."""
    if not painted.read:
        return ""
    asked, read = asked_digit(prompt), ", ".join(map(str, painted.read))
    if asked is None:
        return f"reads as {read}"
    right = sum(digit == asked for digit in painted.read)
    return f"reads as {read}: {right} of {len(painted.read)} right"


def variants(
    folders: Sequence[Path], with_torch: bool, pipe: Any, source: ModelSource, request: GenerateRequest
) -> Iterator[tuple[str, Any]]:
    """Names and backbones, each loaded when its turn comes."""
    if with_torch:
        yield TORCH, getattr(pipe, source.family.component)
    for number, folder in enumerate(folders):
        other = Artifact.load(folder)
        if other.manifest["model"].get("family") != source.family.name:
            raise DiffcError(f"{folder} holds no {source.family} backbone", fix="compare what is alike")
        target = request.target if number == 0 else None
        config = source.config if is_imported(other) else None
        opened = partial(load, folder, target=target, device=pipe.device, dtype=pipe.vae.dtype, config=config)
        module = opened()
        if number == 0:
            module.set_lora(request.loras)
        for name in other.manifest.get("experts", ()):
            setattr(pipe, name, opened(component=name))
        yield f"{other.manifest['format']} {module.target} ({folder.name})", module


def run_pipeline(pipe: Any, backbone: Any, request: GenerateRequest, update: Update) -> tuple[Tensor, float]:
    """The images on the CPU, and the seconds of the whole pipeline."""
    parameters = signature(pipe.__call__).parameters
    settings: dict[str, Any] = plain_sizes(parameters)
    if name := frames_argument(parameters):
        settings[name] = request.frames
    if request.guidance is not None:
        settings["guidance_scale"] = request.guidance
    if request.negative_prompt is not None:
        settings["negative_prompt"] = [request.negative_prompt] * request.batch
    if isinstance(backbone, CompiledBackbone):
        backbone.start(request.steps)

    def told(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        update(step + 1, request.steps)
        return values

    if "callback_on_step_end" in parameters:
        settings["callback_on_step_end"] = told
    started = time.perf_counter()
    with text_cleaner(type(pipe)):
        result = pipe(
            prompt=[request.prompt]
            * request.batch,  # by name: it is not the first argument of every pipeline
            num_inference_steps=request.steps,
            height=request.height,
            width=request.width,
            generator=[torch.Generator().manual_seed(request.seed + n) for n in range(request.batch)],
            output_type="pt",
            **settings,
        )
    seconds = time.perf_counter() - started
    images = (result.images if hasattr(result, "images") else result.frames).float().cpu()
    return images.flatten(0, -4), seconds  # of a video, [N, frames, 3, H, W]


def _judge(
    name: str, images: Tensor, seconds: float, before: Sequence[Painted], source: ModelSource
) -> Painted:
    """Figures of one variant, against the first."""
    if not torch.isfinite(images).all():
        raise DiffcError(f"{name} painted NaN", fix="compile again with --dtype bfloat16 or float32")
    read: tuple[int, ...] = ()
    if source.name.startswith("digits-"):
        seen = centred(images) if source.family.frames else images  # in videos digits are anywhere
        read = tuple(int(digit) for digit in read_digits(seen).argmax(axis=1))
    first = before[0].images if before else None
    if first is None:
        return Painted(name, images, seconds, None, None, read)
    return Painted(name, images, seconds, psnr(images, first), ssim(images, first), read)


def _picture(painted: Sequence[Painted]) -> Any:
    """One image: the painted one itself, or all in columns with what is known of them."""
    if len(painted) == 1 and len(painted[0].images) == 1:
        return to_image(painted[0].images[0])
    return montage([Column(p.images, captions(p)) for p in painted])


def captions(painted: Painted) -> tuple[str, ...]:
    """The lines above a column."""
    lines = [painted.name, f"{painted.seconds:.1f} s"]
    if painted.psnr is not None:
        lines.append(f"PSNR {painted.psnr:.1f} dB, SSIM {painted.ssim:.3f}")
    if painted.read:
        lines.append("reads as " + ", ".join(map(str, painted.read)))
    return tuple(lines)
