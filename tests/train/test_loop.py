"""The descent on a small network: it goes on after a kill as if there had been none, and keeps what judges best."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.train.calls import Batch
from diffc.train.loop import Course, Record, descend, rate_at, trial
from diffc.train.request import Judgement

COURSE = Course(steps=12, rate=0.05, batch_size=8, accumulate=2, interval=3, seed=1)
START = Judgement(0, 0.0, None, 0.0, None)


class Line:
    """Batches of a linear map that the student is to find."""

    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(9))

    def draw(self, generator: torch.Generator, rows: int) -> Batch:
        x = torch.randn(rows, 5, generator=generator)
        return Batch({"x": x}, x @ self.weight.T)


def network() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(5, 3)


def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(inputs["x"])  # type: ignore[no-any-return]


def closeness(model: nn.Module) -> tuple[float, float | None]:
    return -float((model.weight - Line.weight).norm()), None  # type: ignore[operator]


def run(
    student: nn.Module, folder: Path | None, course: Course = COURSE, stop_at: int | None = None
) -> Record:
    def update(done: int, _: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    start = replace(START, snr=-100.0)
    return descend(
        student,
        Line(),
        closeness,
        forward,
        course,
        accelerator=Accelerator(cpu=True),
        start=start,
        folder=folder,
        update=update,
    )


def test_the_descent_descends() -> None:
    record = run(student := network(), None)
    assert [j.step for j in record.curve] == [3, 6, 9, 12]
    losses = [j.loss or 0.0 for j in record.curve]
    assert losses[-1] < 0.7 * losses[0]
    assert record.best is not None
    assert record.best.snr == max(j.snr for j in record.curve)
    assert record.weights is not None
    assert torch.equal(record.weights["weight"], student.weight)  # the last were the best


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("stop_at", [5, 6, 11])
def test_a_stopped_descent_goes_on_as_if_it_had_not_been(
    stop_at: int, optimizer: str, tmp_path: Path
) -> None:
    course = replace(COURSE, optimizer=optimizer, ema=0.8)
    whole = run(one := network(), tmp_path / "whole", course)
    with pytest.raises(KeyboardInterrupt):
        run(network(), tmp_path / "part", course, stop_at=stop_at)
    rest = run(other := network(), tmp_path / "part", course)
    assert torch.equal(one.weight, other.weight)
    assert rest.curve == whole.curve
    assert rest.best == whole.best
    assert whole.weights is not None
    assert rest.weights is not None
    assert torch.equal(whole.weights["weight"], rest.weights["weight"])
    progress = json.loads((tmp_path / "part" / "progress.json").read_text(encoding="utf-8"))
    assert progress["step"] == 12
    assert [p.name for p in (tmp_path / "part").glob("step-*")] == ["step-12"]


def test_only_what_is_better_than_the_start_is_kept() -> None:
    student = network()
    student.weight.data.copy_(Line.weight)
    student.bias.data.zero_()
    record = descend(
        student,
        Line(),
        closeness,
        forward,
        replace(COURSE, rate=0.5),
        accelerator=Accelerator(cpu=True),
        start=replace(START, snr=0.0),
        folder=None,
        update=lambda done, total: None,
    )
    assert record.best is None
    assert record.weights is None
    assert len(record.curve) == 4


def test_the_average_is_judged_and_kept_and_the_weights_go_on() -> None:
    plain, averaged = run(one := network(), None), run(other := network(), None, replace(COURSE, ema=0.9))
    assert torch.equal(one.weight, other.weight)
    assert plain.weights is not None
    assert averaged.weights is not None
    assert not torch.equal(plain.weights["weight"], averaged.weights["weight"])


def test_a_loss_that_is_not_finite_ends_it() -> None:
    student = network()
    student.weight.data.fill_(float("nan"))
    with pytest.raises(DiffcError, match=r"the loss is nan at step 1: the training diverged at rate 0\.05"):
        run(student, None)


def test_the_rate_rises_then_falls() -> None:
    course = replace(COURSE, steps=100)
    rates = [rate_at(step, course) for step in range(100)]
    assert max(rates) == pytest.approx(0.05)
    assert rates.index(max(rates)) in (4, 5)
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] < 1e-4
    assert sorted(rates[5:], reverse=True) == rates[5:]
    short = trial(course, 3e-4)
    assert (short.steps, short.rate, short.interval) == (10, 3e-4, 10)
