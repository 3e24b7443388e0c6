"""`train`: calibrate, let the teacher paint, try rates, train, keep the best weights; one call per stage."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.models.inputs import forward_kwargs
from diffc.models.sources.backbone import FakeBackbone, check_weights, quiet_libraries
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from diffc.quantize.checkpoint import Checkpoint
from diffc.train.calls import Calls
from diffc.train.judge import answers_snr
from diffc.train.loop import Course, Draws, Record, descend, trial
from diffc.train.report import save_report
from diffc.train.request import LADDER, Judgement, TrainPlan, TrainRequest, TrainResult, check
from diffc.train.stages import calibrated, prepared
from diffc.train.student import put_state, state_of, student_of, trained_weights
from diffc.train.workspace import workspace
from passes.files.atomic import write_text

JUDGED = 10
"""Calls that a judgement asks, of each kind."""


def train(request: TrainRequest, ui: Reporter | None = None) -> TrainResult:
    """Train a quantized backbone and write the checkpoint that `diffc compile --from-checkpoint` takes.

    Never hands back less than calibration alone: weights are kept only where they answer unseen calls better. A call
    that was stopped goes on where it was. Raises DiffcError for what the user can fix.
    """
    from accelerate import Accelerator

    ui = ui or default_reporter()
    plan, started = check(request), time.perf_counter()
    check_weights(FakeBackbone(plan.source))
    check_device(request)
    accelerator = Accelerator(cpu=request.device == "cpu", mixed_precision=request.precision)
    with workspace(plan, accelerator, ui) as work:
        checkpoint = calibrated(plan, accelerator, work, ui)
        data, calls = prepared(plan, accelerator, work, ui)
        student = student_of(plan, checkpoint).to(accelerator.device)
        training = Training(plan, student, data, calls, accelerator, work, ui)
        before = Judgement(0, 0.0, None, *training.judge(student))
        ui.note(f"calibration alone: {before.snr:.2f} dB of signal to noise on unseen calls")
        rate, trials = training.choose_rate(before)
        record = training.run(before, rate)
        result = training.finish(checkpoint, record, before)
        result = replace(result, rate=rate, trials=trials, seconds=round(time.perf_counter() - started, 1))
        if accelerator.is_main_process:
            for line in save_report(result):
                ui.note(line)
    return result


def check_device(request: TrainRequest) -> None:
    """Raise DiffcError when the GPU that is asked for, or that a precision needs, is not there."""
    if request.device != "cpu" and torch.cuda.is_available():
        return
    if request.device == "cuda":
        raise DiffcError(
            "torch sees no GPU", fix="install a torch with CUDA (diffc doctor), or give --device cpu"
        )
    if request.precision == "fp16":
        raise DiffcError("--mixed-precision fp16 needs a GPU", fix="give --mixed-precision bf16, or no")


@dataclass(frozen=True)
class Training:
    """A student, what it learns from, and the calls that judge it ("unseen", and "seen" where calls are learned)."""

    plan: TrainPlan
    student: nn.Module
    data: Draws
    calls: Mapping[str, Calls]
    accelerator: Any
    work: Path
    ui: Reporter

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The output of a model for graph inputs by name, which a teacher on a GPU has recorded in 16 bits."""
        source = self.plan.source
        wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
        kwargs = forward_kwargs(source.family, source.config, wide)
        output: Tensor = model(**kwargs, return_dict=False)[0]
        return output

    def judge(self, model: nn.Module) -> tuple[float, float | None]:
        """Unseen and seen SNR in dB."""
        found = {
            name: answers_snr(model, calls.spread(JUDGED), self.forward, self.accelerator.device)
            for name, calls in self.calls.items()
        }
        return found["unseen"], found.get("seen")

    def choose_rate(self, before: Judgement) -> tuple[float, list[Judgement]]:
        """The rate that is given, or that of LADDER whose short course ends best. The student is as before then."""
        request = self.plan.request
        if request.rate is not None:
            return request.rate, []
        begin, trials = state_of(self.student), []
        for rate in LADDER:
            note, course = self.work / f"trial-{rate:g}.json", trial(self._course(rate), rate)
            if note.is_file():  # of a call that was stopped
                trials.append(Judgement(**json.loads(note.read_text(encoding="utf-8"))))
                continue
            title = f"try rate {rate:g} for {course.steps} steps"
            found = self._trial(title, course, before)
            put_state(self.student, begin)
            trials.append(found)
            if self.accelerator.is_main_process:
                write_text(note, json.dumps(asdict(found)) + "\n")
            self.ui.note(f"rate {rate:g}: {found.snr:.2f} dB after {found.step} steps")
        return max(trials, key=lambda found: found.snr).rate, trials

    def _trial(self, title: str, course: Course, before: Judgement) -> Judgement:
        try:
            record = self._descend(title, course, before, None)
        except DiffcError as error:  # it diverged, which is an answer
            self.ui.note(error.what)
            return Judgement(course.steps, course.rate, None, float("-inf"), None)
        return replace(record.curve[-1], rate=course.rate)

    def run(self, before: Judgement, rate: float) -> Record:
        """The training itself."""
        course = self._course(rate)
        title = f"train {self.plan.request.method}: {course.steps} steps at rate {rate:g}"
        return self._descend(title, course, before, self.work / "course")

    def _course(self, rate: float) -> Course:
        r = self.plan.request
        return Course(r.steps, rate, r.batch_size, r.accumulate, r.interval, r.seed, r.ema, r.optimizer)

    def _descend(self, title: str, course: Course, before: Judgement, folder: Path | None) -> Record:
        with quiet_libraries(), self.ui.stage(title) as update:
            return descend(
                self.student,
                self.data,
                self.judge,
                self.forward,
                course,
                accelerator=self.accelerator,
                start=before,
                folder=folder,
                update=update,
            )

    def finish(self, checkpoint: Checkpoint, record: Record, before: Judgement) -> TrainResult:
        """Write the checkpoint with the best weights, or calibration alone where none is better."""
        request, after = self.plan.request, before
        if record.weights is not None:
            put_state(self.student, record.weights)
            weights = trained_weights(self.student, self.plan.source)
            assert record.best is not None
            snr, seen = self.judge(self.student)
            after = replace(record.best, snr=snr, seen=seen)
            told = {"method": request.method, "steps": after.step, "rate": after.rate, "data": request.data}
            if after.snr > before.snr:
                calibration = {**checkpoint.calibration, "training": told}
                checkpoint = replace(checkpoint, weights=weights, calibration=calibration)
            else:
                after = before
        if self.accelerator.is_main_process:
            checkpoint.save(request.output)
        self.accelerator.wait_for_everyone()
        trained = bool(checkpoint.weights) and after is not before
        return TrainResult(
            request.output,
            request.method,
            trained,
            before,
            after,
            0.0,
            curve=record.curve,
            carried=len(checkpoint.weights) if trained else 0,
        )
