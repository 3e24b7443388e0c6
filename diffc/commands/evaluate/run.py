"""`diffc evaluate`: metrics of pictures that models have made of the same prompts, and what the figures are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffc.errors import DiffcError, UnsupportedError, UsageError, unknown_value
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.quality.metrics.clip import CLIP, Clip
from diffc.quality.metrics.entries import Entry, as_tensor, models_of, opened, read_entries
from diffc.quality.metrics.image_reward import TOKENS, VOCABULARY, WEIGHTS, ImageReward
from diffc.quality.metrics.lpips import ALEXNET, Lpips
from diffc.quality.metrics.statistics import Mean, difference_of, frechet, mean_of
from diffc.quality.pictures import Column, montage, psnr, save_png, ssim

METRICS: Mapping[str, str] = {
    "imagereward": "how much people would like a picture for its prompt (ImageReward-v1.0); higher is better",
    "clip-iqa": "how much nearer a picture is to 'Good photo.' than to 'Bad photo.', 0 to 1; higher is better",
    "clip": "100 x the cosine of picture and prompt in CLIP; higher is better",
    "psnr": "peak signal-to-noise ratio against the reference's picture, dB; higher is nearer",
    "ssim": "structural similarity to the reference's picture; higher is nearer",
    "lpips": "how different a picture looks from the reference's (AlexNet); lower is nearer",
    "clip-fid": "Frechet distance of CLIP's features to the reference's pictures, which is not FID; lower is nearer",
    "fid": "Frechet Inception distance to the reference's pictures (needs torch-fidelity); lower is nearer",
}
COMPARED = ("psnr", "ssim", "lpips", "clip-fid", "fid")
"""Metrics against the pictures of a reference."""
_SETS = ("clip-fid", "fid")
"""Metrics of all pictures together, which have no score of one picture."""
_SHEET = 8
"""Prompts that the picture side by side shows."""


@dataclass(frozen=True)
class EvaluateRequest:
    """What to judge (see `read_entries`) and by what.

    `reference` is the model that others are compared with, empty for the first. `clip_model` and `bert` are folders or
    ids of the hub, `imagereward` a file or OWNER/REPOSITORY/FILE, `alexnet` a file. `sheet` is a PNG with the pictures
    side by side.
    """

    data: Path
    metrics: tuple[str, ...] = ("imagereward",)
    reference: str = ""
    clip_model: str = CLIP
    imagereward: str = WEIGHTS
    bert: str = VOCABULARY
    alexnet: Path | None = None
    sheet: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Score:
    """A metric of a model: over prompts, and as the difference to the reference; `each` is by prompt."""

    model: str
    metric: str
    value: Mean
    difference: Mean | None
    each: Sequence[float] = ()


@dataclass(frozen=True)
class Evaluation:
    """All scores, and notes on what was cut."""

    prompts: int
    reference: str
    scores: Sequence[Score]
    notes: Sequence[str] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


Judge = Callable[[Image.Image, Image.Image, str], float]
"""(picture, the reference's picture, prompt) -> score."""


def evaluate(request: EvaluateRequest, ui: Reporter | None = None) -> Evaluation:
    """Judge every picture. Everything that can be refused is refused before the first picture is judged."""
    ui = ui or default_reporter()
    entries = read_entries(request.data)
    models = models_of(entries)
    reference = request.reference or models[0]
    _check(request, models, reference)
    if request.sheet is not None:
        check_output_file(request.sheet)
    with ui.stage("load the networks") as update:
        tools = _Tools(request)
        for number, metric in enumerate(request.metrics):
            tools.judge(metric)
            update(number + 1, len(request.metrics))
    _check_sizes(request, entries, reference)
    scores = []
    for metric in request.metrics:
        with ui.stage(f"{metric} of {len(models)} x {len(entries)} pictures") as update:
            found = _found(metric, entries, models, reference, tools, update)
        scores += found
    if request.sheet is not None:
        save_png(_side_by_side(entries, models), request.sheet)
    return Evaluation(len(entries), reference, scores, tools.notes(entries))


def _check(request: EvaluateRequest, models: Sequence[str], reference: str) -> None:
    for metric in request.metrics:
        if metric not in METRICS:
            raise unknown_value("metric", metric, METRICS)
    if reference not in models:
        raise unknown_value("reference", reference, models)
    if (wanted := [m for m in request.metrics if m in COMPARED]) and len(models) < 2:
        raise UsageError(
            f"{wanted[0]} compares with a reference, and there is one model alone",
            fix="add the pictures of another model, such as the uncompiled one",
        )
    if "lpips" in request.metrics and request.alexnet is None:
        raise UsageError("lpips needs AlexNet's weights", fix=f"download {ALEXNET}, and give --alexnet FILE")


def _check_sizes(request: EvaluateRequest, entries: Sequence[Entry], reference: str) -> None:
    """Raise DiffcError where pictures that are compared have different sizes."""
    if not {"psnr", "ssim", "lpips"} & set(request.metrics):
        return
    for entry in entries:
        sizes = {name: opened(path).size for name, path in entry.images.items()}
        for name, size in sizes.items():
            if size != sizes[reference]:
                raise DiffcError(
                    f"the picture of {name!r} for {entry.prompt!r} is {size[0]}x{size[1]}, that of {reference!r} is"
                    f" {sizes[reference][0]}x{sizes[reference][1]}",
                    fix="make pictures of one size, or leave psnr, ssim and lpips out",
                )


class _Tools:
    """The networks, each loaded once, when it is first asked for."""

    def __init__(self, request: EvaluateRequest) -> None:
        self._request = request
        self._clip: Clip | None = None
        self._reward: ImageReward | None = None
        self._lpips: Lpips | None = None

    def clip(self) -> Clip:
        """CLIP."""
        self._clip = self._clip or Clip(self._request.clip_model, self._request.device)
        return self._clip

    def judge(self, metric: str) -> Judge | None:
        """What scores one picture; None for a metric of all pictures together. Raises DiffcError without a network."""
        request = self._request
        if metric == "imagereward":
            self._reward = self._reward or ImageReward(request.imagereward, request.bert, request.device)
            reward = self._reward
            return lambda image, _, prompt: reward.score(image, prompt)
        if metric in ("clip", "clip-iqa"):
            clip = self.clip()
            if metric == "clip":
                return lambda image, _, prompt: clip.score(image, prompt)
            return lambda image, _, __: clip.quality(image)
        if metric == "lpips":
            assert request.alexnet is not None
            self._lpips = self._lpips or Lpips(request.alexnet, request.device)
            lpips = self._lpips
            return lambda image, other, _: lpips.distance(as_tensor(image), as_tensor(other))
        if metric in ("psnr", "ssim"):
            compare = psnr if metric == "psnr" else ssim
            return lambda image, other, _: compare(as_tensor(image), as_tensor(other))
        if metric == "clip-fid":
            self.clip()
        else:
            _inception()
        return None

    def notes(self, entries: Sequence[Entry]) -> list[str]:
        """What the networks did not read of the prompts."""
        prompts = [entry.prompt for entry in entries]
        lines = []
        for name, tool, limit in (
            ("CLIP", self._clip, self._clip.limit if self._clip else 0),
            ("ImageReward", self._reward, TOKENS),
        ):
            cut = 0 if tool is None else sum(tool.tokens(prompt) > limit for prompt in prompts)
            if cut:
                lines.append(f"{name} reads {limit} tokens: {cut} of {len(prompts)} prompts were cut")
        return lines


def _inception() -> Any:
    """torchmetrics' FID with the Inception of torch-fidelity. Raises UnsupportedError without that package."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        return FrechetInceptionDistance(feature=2048)
    except ImportError as error:
        raise UnsupportedError(
            "fid needs torch-fidelity, whose Inception it is computed with, and it is not installed",
            fix="install the package torch-fidelity, or take --metrics clip-fid, which needs CLIP alone",
        ) from error


def _found(
    metric: str,
    entries: Sequence[Entry],
    models: Sequence[str],
    reference: str,
    tools: _Tools,
    update: Callable[[int, int], None],
) -> list[Score]:
    """The scores of every model; of metrics that compare, none of the reference."""
    judge, compares = tools.judge(metric), metric in COMPARED
    judged = [model for model in models if not (compares and model == reference)]
    if judge is None:
        return [_of_set(metric, entries, model, reference, tools) for model in judged]
    each: dict[str, list[float]] = {model: [] for model in judged}
    for number, entry in enumerate(entries):
        other = opened(entry.images[reference])
        for model in judged:
            each[model].append(judge(opened(entry.images[model]), other, entry.prompt))
        update(number + 1, len(entries))
    return [
        Score(
            model,
            metric,
            mean_of(values),
            None if compares or model == reference else difference_of(values, each[reference]),
            values,
        )
        for model, values in each.items()
    ]


def _of_set(metric: str, entries: Sequence[Entry], model: str, reference: str, tools: _Tools) -> Score:
    if len(entries) < 2:
        raise UsageError(f"{metric} compares distributions, and there is one prompt", fix="give many")
    pictures = [[opened(entry.images[name]) for entry in entries] for name in (model, reference)]
    if metric == "clip-fid":
        clip = tools.clip()
        sets = [
            np.concatenate([clip.of_image(image).double().numpy() for image in some]) for some in pictures
        ]
        value = frechet(*sets)
    else:
        distance = _inception()
        for real, some in zip((False, True), pictures, strict=True):
            for image in some:
                distance.update((as_tensor(image) * 255).round().byte(), real=real)
        value = float(distance.compute())
    return Score(model, metric, Mean(value, None, None, None), None)


def _side_by_side(entries: Sequence[Entry], models: Sequence[str]) -> Image.Image:
    """The pictures of the first prompts, a column for each model; scaled to the size of the first."""
    import torch

    shown = entries[:_SHEET]
    size = opened(shown[0].images[models[0]]).size
    columns = []
    for model in models:
        images = [as_tensor(opened(entry.images[model]).resize(size)) for entry in shown]
        columns.append(Column(torch.cat(images), (model,)))
    return montage(columns)
