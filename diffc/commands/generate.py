"""`diffc generate`: the pipeline of an artifact with its compiled backbone, beside torch or other artifacts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffc.artifact.folder import Artifact
from diffc.errors import DiffcError
from diffc.models.sources.locate import ModelSource, locate
from diffc.models.sources.pipelines import open_pipeline
from diffc.models.spec import Shape
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.quality.pictures import Column, montage, psnr, save_png, ssim, to_image
from diffc.runtime.load import load, resolve
from diffc.runtime.module import CompiledBackbone

TORCH = "torch"
"""What --compare calls the uncompiled pipeline."""


@dataclass(frozen=True)
class GenerateRequest:
    """What to paint, and with what; None leaves a setting to the pipeline.

    `compare` holds artifact folders, and "torch" for the uncompiled backbone. Image n of `batch` has the seed
    `seed` + n. `size` is in pixels, `pipeline` the diffusers folder in the place of the one of the compile.
    """

    artifact: Path
    output: Path
    prompt: str
    compare: tuple[str, ...] = ()
    steps: int = 25
    seed: int = 0
    size: int | None = None
    guidance: float | None = None
    batch: int = 1
    pipeline: str | None = None
    target: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Painted:
    """The images [N, 3, H, W] in 0..1 of one variant, the seconds they took, and how they compare.

    `psnr` (dB) and `ssim` are against the first variant, None for itself. `read` holds the digits that the
    classifier reads, empty for models that paint no digits.
    """

    name: str
    images: Tensor
    seconds: float
    psnr: float | None
    ssim: float | None
    read: tuple[int, ...]


def generate(request: GenerateRequest, ui: Reporter) -> list[Painted]:
    """Paint with every variant and write the picture; torch first, since the others are held against it.

    Raises DiffcError for an artifact, pipeline, size or target that does not fit.
    """
    check_output_file(request.output)
    artifact = Artifact.load(request.artifact)
    source = _source(artifact, request.pipeline)
    _, device = resolve(artifact, request.target, request.device)
    others = [Path(name) for name in dict.fromkeys(request.compare) if name != TORCH]
    folders = [request.artifact, *others]
    with_torch = TORCH in request.compare
    with ui.stage("load the pipeline"):
        pipe = _pipeline(source, artifact, device, with_backbone=with_torch)
    size = request.size or int(pipe.vae.config.sample_size)
    source.family.check(source.config, Shape(request.batch, size, size, 1))
    painted: list[Painted] = []
    for name, backbone in _variants(folders, with_torch, pipe, source, request):
        setattr(pipe, source.family.component, backbone)
        if isinstance(backbone, CompiledBackbone):
            backbone.start(request.steps)
        with ui.stage(f"paint with {name}") as update:
            images, seconds = _paint(pipe, request, size, update)
        painted.append(_judge(name, images, seconds, painted, source))
        if isinstance(backbone, CompiledBackbone):
            backbone.close()
    save_png(_picture(painted), request.output)
    return painted


def asked_digit(prompt: str) -> int | None:
    """The one digit that a prompt names in words or as a numeral; None where there is none or more than one."""
    from diffc.models.embedded.digits import WORDS

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


def _source(artifact: Artifact, pipeline: str | None) -> ModelSource:
    """The diffusers pipeline of the compile, or the one that is given."""
    model = artifact.manifest["model"]
    if "family" not in model:
        raise DiffcError(f"{artifact.folder} was compiled from an ONNX file", fix="compile a diffusers model")
    try:
        source = locate(pipeline or artifact.manifest["request"]["model"])
    except DiffcError as error:
        raise DiffcError(
            error.what, fix="give the folder of the diffusers pipeline with --pipeline"
        ) from error
    if source.pipeline_dir is None:
        raise DiffcError(
            f"{source.path} is a backbone alone, and painting takes the whole pipeline",
            fix="give --pipeline and the folder that has model_index.json",
        )
    if source.family.name != model["family"]:
        raise DiffcError(
            f"{source.pipeline_dir} is of family {source.family}, the artifact of {model['family']}",
            fix="give the --pipeline that the artifact was compiled from",
        )
    return source


def _pipeline(source: ModelSource, artifact: Artifact, device: torch.device, *, with_backbone: bool) -> Any:
    """The diffusers pipeline on `device`, in float32 on the CPU; its own backbone is read only if it is needed."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()  # ours tells the stage
    transformers_logging.disable_progress_bar()
    dtype = getattr(torch, artifact.manifest["dtype"]) if device.type == "cuda" else torch.float32
    left_out = {} if with_backbone else {source.family.component: None}
    fix = "download the whole pipeline, or give another --pipeline"
    pipe = open_pipeline(source, dtype=dtype, fix=fix, **left_out)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _variants(
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
        module = load(folder, target=target, device=pipe.device, dtype=pipe.vae.dtype)
        yield f"{other.manifest['format']} {module.target} ({folder.name})", module


def _paint(pipe: Any, request: GenerateRequest, size: int, update: Any) -> tuple[Tensor, float]:
    """The images on the CPU, and the seconds of the whole pipeline."""
    settings = {} if request.guidance is None else {"guidance_scale": request.guidance}

    def told(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        update(step + 1, request.steps)
        return values

    started = time.perf_counter()
    images = pipe(
        [request.prompt] * request.batch,
        num_inference_steps=request.steps,
        height=size,
        width=size,
        generator=[torch.Generator().manual_seed(request.seed + n) for n in range(request.batch)],
        output_type="pt",
        callback_on_step_end=told,
        **settings,
    ).images.float()
    return images.cpu(), time.perf_counter() - started


def _judge(
    name: str, images: Tensor, seconds: float, before: Sequence[Painted], source: ModelSource
) -> Painted:
    """Figures of one variant, against the first."""
    if not torch.isfinite(images).all():
        raise DiffcError(f"{name} painted NaN", fix="compile again with --dtype bfloat16 or float32")
    read: tuple[int, ...] = ()
    if source.name.startswith("digits-"):
        from diffc.quality.classifier import read_digits

        read = tuple(int(digit) for digit in read_digits(images).argmax(axis=1))
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
