"""Steps down a loss with accelerate: a rate that rises and falls, an average of the weights, judgements, and going on.

Nothing depends on what a killed process had in memory: the data of a step are drawn with its number as the seed, and
each judgement leaves weights, average and the optimizer's state as safetensors, whole or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.progress import Update
from diffc.quantize.simulate import cpu_block_quant
from diffc.records import read_record
from diffc.train.calls import Batch
from diffc.train.request import Judgement
from diffc.train.student import State, learning, put_state, state_of
from passes.files.atomic import write_bytes, write_text

WARM_UP = 0.05
"""Share of the steps in which the rate rises; in the others it falls to zero as half a cosine."""
CLIP = 1.0
"""Largest norm of the gradients of a step; longer ones are shortened."""
BETAS = (0.9, 0.98)

Forward = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(model, graph inputs by name) -> the model's output."""


class Draws(Protocol):
    """Where batches come from."""

    def draw(self, generator: torch.Generator, rows: int) -> Batch:
        """A batch of at most `rows` rows."""
        ...


@dataclass(frozen=True)
class Course:
    """How one descent goes: see `TrainRequest`, whose names these are."""

    steps: int
    rate: float
    batch_size: int
    accumulate: int
    interval: int
    seed: int
    ema: float = 0.0
    optimizer: str = "adamw"


@dataclass
class Record:
    """What a descent has done so far, and the best weights; None where none was better than the start."""

    step: int = 0
    curve: list[Judgement] = field(default_factory=list)
    best: Judgement | None = None
    weights: State | None = None


def descend(
    student: nn.Module,
    data: Draws,
    judge: Callable[[nn.Module], tuple[float, float | None]],
    forward: Forward,
    course: Course,
    *,
    accelerator: Any,
    start: Judgement,
    folder: Path | None,
    update: Update,
) -> Record:
    """Train `student` in place and keep the weights that `judge` likes best; its (unseen, seen) SNR is in dB.

    The loss is the mean squared difference to a batch's target. `start` is the judgement before the first step: only
    what is better is kept. With `folder`, what it holds of an earlier call is gone on from. Raises DiffcError when the
    loss is not finite.
    """
    optimizer = _optimizer(student, course)
    model, prepared = accelerator.prepare(student, optimizer)
    average = _Average(student, course.ema)
    record = _resumed(student, optimizer, average, folder)
    losses: list[float] = []
    for step in range(record.step, course.steps):
        rate = rate_at(step, course)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(_step(model, prepared, data, forward, course, accelerator, step))
        if not math.isfinite(losses[-1]):
            raise DiffcError(
                f"the loss is {losses[-1]} at step {step + 1}: the training diverged at rate {course.rate:g}",
                fix="give a lower --lr, or leave it out",
            )
        average.add(student, step)
        update(step + 1, course.steps)
        if (step + 1) % course.interval == 0 or step + 1 == course.steps:
            record.step = step + 1
            with average.in_place(student):
                found = Judgement(step + 1, rate, sum(losses) / len(losses), *judge(student))
                if found.snr > (record.best or start).snr:
                    record.best, record.weights = found, state_of(student)
            record.curve.append(found)
            losses = []
            if folder is not None and accelerator.is_main_process:
                _save(record, student, optimizer, average, folder)
            accelerator.wait_for_everyone()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # it patches forward() for mixed precision
    accelerator.free_memory()
    return record


def rate_at(step: int, course: Course) -> float:
    """The rate of step `step` (from 0): linear to the course's rate, then half a cosine to zero."""
    rise = max(1, round(WARM_UP * course.steps))
    if step < rise:
        return course.rate * (step + 1) / rise
    return course.rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, course.steps - rise)))


def _step(
    model: Any, optimizer: Any, data: Draws, forward: Forward, course: Course, accelerator: Any, step: int
) -> float:
    """One update of the weights; the mean loss of its batches, over all processes."""
    total = 0.0
    for part in range(course.accumulate):
        number = (step * course.accumulate + part) * accelerator.num_processes + accelerator.process_index
        generator = torch.Generator().manual_seed(course.seed * 1_000_003 + number)
        batch = data.draw(generator, course.batch_size)
        inputs = {name: value.to(accelerator.device) for name, value in batch.inputs.items()}
        target = batch.target.to(accelerator.device).float()
        with cpu_block_quant(), accelerator.autocast():
            loss = (forward(model, inputs).float() - target).square().mean()
            accelerator.backward(loss / course.accumulate)
        total += float(accelerator.reduce(loss.detach(), reduction="mean"))
    accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / course.accumulate


def _optimizer(student: nn.Module, course: Course) -> Any:
    parameters = [parameter for _, parameter in learning(student)]
    if course.optimizer == "adafactor":  # keeps no state of the size of the weights
        return torch.optim.Adafactor(parameters, lr=course.rate)
    return torch.optim.AdamW(parameters, lr=course.rate, betas=BETAS, weight_decay=0.0)


class _Average:
    """A running average of the tensors that learn; without a share, the tensors themselves."""

    FILE = "average.safetensors"

    def __init__(self, student: nn.Module, share: float) -> None:
        self._share = share
        own = learning(student) if share else ()
        self.tensors = {name: parameter.detach().clone() for name, parameter in own}

    def add(self, student: nn.Module, step: int) -> None:
        """Take in the weights after step `step`. The first steps count more, so that the start is soon forgotten."""
        share = min(self._share, (step + 1) / (step + 10))
        for name, parameter in learning(student) if self.tensors else ():
            self.tensors[name].lerp_(parameter.detach(), 1 - share)

    def in_place(self, student: nn.Module) -> _Swapped:
        """While this is open, the student has the averaged weights."""
        return _Swapped(student, self.tensors)

    def load(self, folder: Path) -> None:
        """Go on from what `_save` has written."""
        if self.tensors:
            for name, value in load_file(folder / self.FILE).items():
                self.tensors[name].copy_(value)


class _Swapped:
    """A context in which the learning parameters of a model have other values."""

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._model, self._values = model, values
        self._own: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        for name, parameter in learning(self._model) if self._values else ():
            self._own[name] = parameter.data
            parameter.data = self._values[name].clone()

    def __exit__(self, *_: object) -> None:
        for name, parameter in learning(self._model) if self._values else ():
            parameter.data = self._own[name]


_PROGRESS, _WEIGHTS, _BEST, _OPTIMIZER = (
    "progress.json",
    "student.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
)


def _save(record: Record, student: nn.Module, optimizer: Any, average: _Average, folder: Path) -> None:
    """Write all that a later call goes on from: first the tensors of this step, then what names them."""
    place = folder / f"step-{record.step}"
    place.mkdir(parents=True, exist_ok=True)
    write_bytes(place / _WEIGHTS, save(state_of(student)))
    write_bytes(place / _OPTIMIZER, save(_flat(optimizer.state_dict()["state"])))
    if average.tensors:
        write_bytes(
            place / _Average.FILE, save({n: t.cpu().contiguous() for n, t in average.tensors.items()})
        )
    if record.weights is not None:
        write_bytes(place / _BEST, save(dict(record.weights)))
    content = {"step": record.step, "curve": [asdict(j) for j in record.curve], "best": _plain(record.best)}
    write_text(folder / _PROGRESS, json.dumps(content) + "\n")
    for old in folder.glob("step-*"):
        if old != place:
            for file in old.iterdir():
                file.unlink()
            old.rmdir()


def _resumed(student: nn.Module, optimizer: Any, average: _Average, folder: Path | None) -> Record:
    """What `_save` has left in `folder`, put back into student, optimizer and average; else a new record."""
    if folder is None or not (folder / _PROGRESS).is_file():
        return Record()
    content = read_record(folder / _PROGRESS, fix=f"remove {folder}, and train again")
    place = folder / f"step-{content['step']}"
    put_state(student, load_file(place / _WEIGHTS))
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": _nested(load_file(place / _OPTIMIZER))})
    average.load(place)
    best = content["best"] and Judgement(**content["best"])
    weights = load_file(place / _BEST) if best else None
    return Record(content["step"], [Judgement(**j) for j in content["curve"]], best, weights)


def _plain(judgement: Judgement | None) -> dict[str, Any] | None:
    return None if judgement is None else asdict(judgement)


def _flat(state: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The optimizer's tensors by "number.name"; what is a number there becomes a tensor."""
    return {
        f"{number}.{name}": torch.as_tensor(value).detach().cpu().contiguous()
        for number, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def _nested(flat: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    return state


def trial(course: Course, rate: float) -> Course:
    """A short course at another rate, to choose among rates: a tenth of the steps, judged once at its end."""
    steps = max(10, course.steps // 10)
    return replace(course, steps=steps, rate=rate, interval=steps, ema=0.0)
