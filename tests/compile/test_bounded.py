"""Calibration in bounded room: the very amax of the whole model, and one that was interrupted goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from diffc.compile.calibration import PipelineRun, calibrate_on_prompts, usual_arguments
from diffc.compile.plan import Plan, check
from diffc.compile.quantize import pipeline_run
from diffc.compile.request import CompileRequest
from diffc.models.embedded import digits
from diffc.progress import Silent
from diffc.quantize.calibrate import calibrate
from diffc.quantize.checkpoint import Checkpoint
from diffc.quantize.stream import WeightStream

CASES = [
    ("digits-sd3", "fp8", 0.0),
    pytest.param("digits-flux", "nvfp4", 0.0, marks=pytest.mark.slow),
    pytest.param("digits-sdxl", "int8", 0.0, marks=pytest.mark.slow),
    pytest.param("digits-sd3", "int8_smoothquant", 0.0, marks=pytest.mark.slow),
    pytest.param("tiny-sd3", "w4a8_awq", 0.0, marks=pytest.mark.slow),
    # A branch is subtracted in float64 here, as in a compile, and in float32 by ModelOpt.
    pytest.param("digits-sd3", "nvfp4_svdquant", 1e-5, marks=pytest.mark.slow),
]


class Interrupted(KeyboardInterrupt):
    """Stands for a kill after the second batch."""


class Interrupting(Silent):
    """Interrupts the calibration at a step, and keeps the notes."""

    def __init__(self, at: int) -> None:
        self.at, self.notes = at, list[str]()

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[int, int], None]]:
        def update(done: int, total: int) -> None:
            del total
            if title.startswith("calibrate") and done == self.at:
                raise Interrupted

        yield update

    def note(self, text: str) -> None:
        self.notes.append(text)


def plan_of(model: str, format: str, folder: Path) -> Plan:
    prompts = tuple(digits.prompt(digit) for digit in range(3))
    request = CompileRequest(model, folder / "out", format, prompts=prompts, steps=2, batch_size=1)
    return check(CompileRequest(**{**vars(request), "image_size": 64, "seed": 5}))


def whole(plan: Plan, run: PipelineRun) -> Checkpoint:
    """ModelOpt on the whole pipeline, its encoders, VAE and weights all in memory."""
    family, fmt = plan.source.family, plan.format
    with run.opened(plan.source) as pipe:
        calibrate(
            pipe,
            family.component,
            fmt,
            family.unquantized,
            prompts=run.prompts or (),
            steps=run.steps,
            seed=run.seed,
            batch_size=run.batch_size,
            height=64,
            width=64,
            usual=usual_arguments(family, pipe),
            progress=lambda done, total: None,
            options=plan.request.options,
        )
        backbone = getattr(pipe, family.component)
        return Checkpoint.from_backbone(backbone, family=family.name, format=fmt.name)


@pytest.mark.parametrize(("model", "format", "tolerance"), CASES)
def test_bounded_and_interrupted_is_the_whole_model(
    model: str, format: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, format, tmp_path)
    run = pipeline_run(plan)

    def bounded(at: int, work: str = "work", together: int = 1) -> tuple[Checkpoint, list[str]]:
        ui, options, into = Interrupting(at), plan.request.options, tmp_path / work
        made = calibrate_on_prompts(
            plan.source, plan.format, options, run, ui, work=into, room=0, together=together
        )
        return made, ui.notes

    with pytest.raises(Interrupted):
        bounded(at=5)  # the first step of the third batch, of two steps each
    streamed: list[nn.Module] = []
    original = WeightStream.__init__

    def noting(self: Any, module: nn.Module, *rest: Any, **named: Any) -> None:
        streamed.append(module)
        original(self, module, *rest, **named)

    monkeypatch.setattr(WeightStream, "__init__", noting)
    ours, notes = bounded(at=-1)
    assert any("goes on after batch 2 of 3" in note for note in notes)
    assert len(streamed) == 1  # the backbone: the prompts are encoded, so no encoder is loaded
    if plan.format.algorithm == "max":
        beside, _ = bounded(at=-1, work="beside", together=2)  # two batches, then one
        assert {name: amax.tobytes() for name, amax in beside.amax.items()} == {
            name: amax.tobytes() for name, amax in ours.amax.items()
        }
    theirs = whole(plan, run)
    assert ours.settings == theirs.settings
    for found, expected in ((ours.amax, theirs.amax), (ours.scaling, theirs.scaling)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=0, err_msg=name)
