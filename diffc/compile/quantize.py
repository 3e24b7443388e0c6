"""The first stage of a compile: the calibrated checkpoint, from where the request says."""

from __future__ import annotations

from pathlib import Path

from diffc.artifact.resume import CHECKPOINT, calibration_work, mark_calibrated
from diffc.compile.calibration import (
    PipelineRun,
    calibrate_on_prompts,
    calibrate_on_random_inputs,
    kept_checkpoint,
    load_checkpoint,
    uncalibrated,
)
from diffc.compile.held_checkpoint import held_checkpoint
from diffc.compile.keys import calibration_key
from diffc.compile.plan import Plan
from diffc.compile.shared import Calibrations
from diffc.models.sources.backbone import FakeBackbone
from diffc.progress import Reporter
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.formats import STORED


def quantize(
    plan: Plan,
    backbone: FakeBackbone,
    folder: Path,
    ui: Reporter,
    calibrations: Calibrations | None = None,
) -> Checkpoint | None:
    """The calibrated checkpoint, saved in `folder`/checkpoint, in `calibrations`, and where --save-checkpoint says.

    None for a format that does not quantize.
    """
    if plan.format is STORED:
        checkpoint = held_checkpoint(plan.source, backbone)
        if checkpoint is not None:
            checkpoint.save(folder / CHECKPOINT)
        return checkpoint
    if not plan.format.quantizes:
        return None
    checkpoint = kept_checkpoint(folder)
    if checkpoint is not None:
        ui.note("calibration is taken over from a compile that was stopped")
    shared = calibrations if plan.calibrates else None
    key = "" if shared is None else calibration_key(plan)
    if checkpoint is None and shared is not None and shared.lend(key, folder / CHECKPOINT):
        checkpoint = Checkpoint.load(folder / CHECKPOINT)
        ui.note("calibration is taken from an equal one of another compile")
    if checkpoint is None:
        checkpoint = saved(calibrated(plan, backbone, ui, calibration_work(folder)), folder)
        if plan.calibrates:
            mark_calibrated(folder)
    if shared is not None:
        shared.keep(key, folder / CHECKPOINT)
    if checkpoint.weights:
        count, all_weights = len(checkpoint.weights), len(plan.source.weights)
        ui.note(
            f"{count} of {all_weights} weights are those of the checkpoint, not those of {plan.source.name}"
        )
    if plan.request.save_checkpoint is not None:
        checkpoint.save(plan.request.save_checkpoint)
        ui.note(f"the calibration is saved in {plan.request.save_checkpoint}")
    return checkpoint


def saved(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint, saved in `folder`/checkpoint; one with weights of its own as it is read from there.

    Those weights are from then on those of the copy, so that the artifact depends on no other file, and a compile
    that is taken up finds the journal of the same sources.
    """
    checkpoint.save(folder / CHECKPOINT)
    return Checkpoint.load(folder / CHECKPOINT) if checkpoint.weights else checkpoint


def calibrated(plan: Plan, backbone: FakeBackbone, ui: Reporter, work: Path | None = None) -> Checkpoint:
    """The checkpoint that the request names, or a new one, whose calibration keeps in `work` how far it is."""
    request = plan.request
    if plan.checkpoint is not None:
        return plan.checkpoint
    if request.from_checkpoint is not None:
        return load_checkpoint(request.from_checkpoint, plan.format, backbone)
    if plan.format.algorithm is None:
        return uncalibrated(plan.format, request.options, backbone)
    if request.calibrate == "synthetic":
        return calibrate_on_random_inputs(
            plan.source,
            plan.format,
            request.options,
            ui,
            batch_size=request.batch_size,
            size=request.image_size,
            seed=request.seed,
        )
    run = pipeline_run(plan)
    if plan.sampling.why:
        ui.note(str(plan.sampling))
    return calibrate_on_prompts(
        plan.source, plan.format, request.options, run, ui, count=request.calib_size, work=work
    )


def pipeline_run(plan: Plan) -> PipelineRun:
    """How the request wants the pipeline to be run."""
    r, sampling = plan.request, plan.sampling
    return PipelineRun(
        r.prompts,
        sampling.steps,
        r.batch_size,
        r.height or r.image_size,
        r.width or r.image_size,
        r.seed,
        plan.dtype,
        r.component_dtypes,
        sampling.guidance,
        r.negative_prompt,
    )
