"""The stages before the first step: a calibration to begin with, the teacher's calls, pictures as latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffc.compile.calibration import PipelineRun, calibrate_on_prompts, load_checkpoint, uncalibrated
from diffc.models.sources.backbone import DTYPES, FakeBackbone, quiet_libraries
from diffc.models.sources.pipelines import open_pipeline, pipeline_seconds
from diffc.models.sources.source import ModelSource
from diffc.progress import Reporter, estimated
from diffc.quantize.calibrate import DEFAULT_PROMPTS
from diffc.quantize.checkpoint import Checkpoint
from diffc.train.calls import INDEX, Calls, Recorder, rows_of
from diffc.train.capture import call_arguments, record_calls, split
from diffc.train.data import encode_pictures, read_pictures
from diffc.train.loop import Draws
from diffc.train.request import TrainPlan

UNSEEN_NOISE = 1 << 20
"""Between the seed of the noise that is trained on and that of the noise that judges."""


def calibrated(plan: TrainPlan, accelerator: Any, work: Path, ui: Reporter) -> Checkpoint:
    """The calibration to begin with: the one that is given, the one of a stopped call, or a new one."""
    request, folder = plan.request, work / "calibration"
    if accelerator.is_main_process and not folder.is_dir():
        if request.from_checkpoint is not None:
            found = load_checkpoint(request.from_checkpoint, plan.format, FakeBackbone(plan.source))
        elif plan.format.algorithm is None:
            found = uncalibrated(plan.format, request.options, FakeBackbone(plan.source))
        else:
            run = PipelineRun(
                request.prompts,
                plan.sampling.steps,
                request.teacher_batch,
                plan.pixels,
                plan.pixels,
                request.seed,
                plan.source.dtype,
                guidance=plan.sampling.guidance,
            )
            begun = work / "calibrating"
            found = calibrate_on_prompts(plan.source, plan.format, request.options, run, ui, work=begun)
        found.save(folder)
    accelerator.wait_for_everyone()
    return Checkpoint.load(folder)


def prepared(
    plan: TrainPlan, accelerator: Any, work: Path, ui: Reporter
) -> tuple[Draws, Mapping[str, Calls]]:
    """What is trained on, and the calls that judge ("unseen", and "seen" where calls are trained on)."""
    request, source = plan.request, plan.source
    wanted = ("unseen",) if request.on_data else ("seen", "unseen")
    pipe = None
    lacking = [name for name in wanted if not (work / name / INDEX).is_file()]
    if request.on_data or (lacking and accelerator.is_main_process):
        pipe = _pipeline(source, accelerator.device, ui)
    if lacking and accelerator.is_main_process:
        _record(plan, pipe, work, lacking, ui)
    accelerator.wait_for_everyone()
    calls = {name: Calls.load(work / name, rows_of(source.family, source.config)) for name in wanted}
    if not request.on_data:
        return calls["seen"], calls
    pictures = read_pictures(request.data, plan.pixels, request.seed)
    call = call_arguments(pipe, plan)
    with quiet_libraries(), ui.stage(f"encode {len(pictures)} pictures and their prompts") as update:
        return encode_pictures(pipe, source, pictures, call, update), calls


def _pipeline(source: ModelSource, device: torch.device, ui: Reporter) -> Any:
    """The pipeline of the teacher, in the type of its weights on a GPU, in float32 on the CPU."""
    dtype = DTYPES[source.dtype] if device.type == "cuda" else torch.float32
    fix = "download the whole pipeline (tokenizers, text encoders, VAE, scheduler)"
    with (
        ui.stage("load the pipeline") as update,
        quiet_libraries(),
        estimated(update, pipeline_seconds(source)),
    ):
        return open_pipeline(source, dtype=dtype, fix=fix).to(device)


def _record(plan: TrainPlan, pipe: Any, work: Path, wanted: list[str], ui: Reporter) -> None:
    request, source = plan.request, plan.source
    seen, unseen = split(request.prompts or DEFAULT_PROMPTS, request.teacher_images)
    call = call_arguments(pipe, plan)
    for name, prompts, seed in (
        ("seen", seen, request.seed),
        ("unseen", unseen, request.seed + UNSEEN_NOISE),
    ):
        if name not in wanted:
            continue
        recorder = Recorder(work / name, rows_of(source.family, source.config))
        title = f"the teacher paints {len(prompts)} images ({name}), {plan.sampling.steps} steps, {plan.pixels} px"
        with quiet_libraries(), ui.stage(title) as update:
            record_calls(
                pipe,
                source,
                prompts,
                recorder,
                steps=plan.sampling.steps,
                batch=request.teacher_batch,
                seed=seed,
                call=call,
                update=update,
            )
        recorder.finish()
