"""`diffc evaluate`: metrics of pictures that models have made of the same prompts, and what the figures are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from diffc.commands.evaluate.judges import Tools, inception
from diffc.commands.evaluate.painting import Painting, paint
from diffc.commands.evaluate.request import COMPARED, METRICS, EvaluateRequest, Evaluation, Score
from diffc.errors import DiffcError, UsageError, unknown_value
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.quality.metrics.entries import Entry, as_tensor, models_of, opened, read_entries
from diffc.quality.metrics.lpips import ALEXNET
from diffc.quality.metrics.statistics import Mean, difference_of, frechet, mean_of
from diffc.quality.pictures import Column, montage, save_png

_SHEET = 8
"""Prompts that the picture side by side shows."""


def evaluate(request: EvaluateRequest, ui: Reporter | None = None) -> Evaluation:
    """Judge every picture. Everything that can be refused is refused before the first picture is judged."""
    ui = ui or default_reporter()
    entries = _given(request)
    models = models_of(entries) if entries else _painted(request).names
    reference = request.reference or models[0]
    _check(request, models, reference)
    if request.sheet is not None:
        check_output_file(request.sheet)
    with ui.stage("load the networks") as update:
        tools = Tools(request)
        for number, metric in enumerate(request.metrics):
            tools.judge(metric)
            update(number + 1, len(request.metrics))
    with ExitStack() as stack:
        if not entries:
            folder = request.pictures or Path(stack.enter_context(TemporaryDirectory(prefix="diffc-")))
            entries = read_entries(paint(_painted(request), folder, ui))
        return _judged(request, entries, models, reference, tools, ui)


def _given(request: EvaluateRequest) -> list[Entry]:
    """The pictures that are there, empty where they are painted first. Raises UsageError for both, and for neither."""
    if (request.data is None) == (request.painting is None):
        raise UsageError(
            "pictures are judged that are there, or that artifacts paint: one of the two",
            fix="give --data-path FILE, or artifacts and --prompts-file FILE",
        )
    if request.painting is not None:
        request.painting.check()
    return [] if request.data is None else read_entries(request.data)


def _painted(request: EvaluateRequest) -> Painting:
    assert request.painting is not None  # `_given` has looked
    return request.painting


def _judged(
    request: EvaluateRequest,
    entries: Sequence[Entry],
    models: Sequence[str],
    reference: str,
    tools: Tools,
    ui: Reporter,
) -> Evaluation:
    """The scores of all metrics, and the sheet."""
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


def _found(
    metric: str,
    entries: Sequence[Entry],
    models: Sequence[str],
    reference: str,
    tools: Tools,
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


def _of_set(metric: str, entries: Sequence[Entry], model: str, reference: str, tools: Tools) -> Score:
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
        distance = inception()
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
