"""Batches that go through a backbone in turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffc.errors import DiffcError
from diffc.quantize.bounded import Bounded
from diffc.quantize.encoded import EncodedPrompts
from diffc.quantize.kept import KeptRuns
from diffc.quantize.prompt_runs import PromptRuns
from diffc.quantize.runs import Passes
from diffc.quantize.stream import WeightStream


class Scheduler:
    """Counts the steps of one call, as those of diffusers do."""

    step = 0


class Pipe:
    """Two steps of two layers; full when more than `room` batches are under way."""

    def __init__(self, backbone: nn.Module, room: int = 99) -> None:
        self.transformer, self.scheduler, self.room = backbone, Scheduler(), room
        self.num_timesteps, self.under_way, self.results = 2, [0], dict[float, Tensor]()

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler, "vae": None}

    def __call__(self, x: Tensor, callback_on_step_end: Any) -> None:
        self.scheduler.step, key = 0, float(x.sum())
        with self.counted():
            for at in range(self.num_timesteps):
                x = self.transformer(x)
                self.scheduler.step += 1
                assert self.scheduler.step == at + 1
                callback_on_step_end(self, at, 0, {})
        self.results[key] = x

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.under_way[0] += 1
        try:
            if self.under_way[0] > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB. GPU 0 has")
            yield
        finally:
            self.under_way[0] -= 1


def runs_of(pipe: Pipe, state: dict[str, Tensor], folder: Path, together: int) -> tuple[Any, ...]:
    reads, steps, notes = list[str](), list[tuple[int, int]](), list[str]()

    def read(name: str) -> Tensor:
        reads.append(name)
        return state[name]

    stream = WeightStream(pipe.transformer, read, torch.device("cpu"))
    stream.arrivals.window = 1  # of one layer, then
    reads.clear()
    xs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    EncodedPrompts(folder).encode(_Silent(pipe), "transformer", [lambda x=x: {"x": x} for x in xs], print)  # type: ignore[misc]
    passes = Passes(lambda done, total: steps.append((done, total)), 1)
    bounded = Bounded(stream, EncodedPrompts(folder), lambda names: None, together)
    calls = [lambda x=x: {"x": x} for x in xs]  # type: ignore[misc]
    kept = KeptRuns(folder / "runs")
    PromptRuns(pipe, pipe.transformer, calls, passes, kept, notes.append, bounded, repeatable=True)(
        pipe.transformer
    )
    stream.close()
    return [pipe.results[float(x.sum())] for x in xs], reads, steps, notes


class _Silent:
    """The pipeline before any callback."""

    def __init__(self, pipe: Pipe) -> None:
        self.components = pipe.components

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.components["transformer"](x)
        return result


def model() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()
    return made, {name: tensor.clone() for name, tensor in made.state_dict().items()}


def test_batches_in_turns_share_each_weight_and_change_no_bit(tmp_path: Path) -> None:
    backbone, state = model()
    alone, reads_alone, steps_alone, _ = runs_of(Pipe(backbone), state, tmp_path / "1", 1)
    beside, reads, steps, notes = runs_of(Pipe(backbone), state, tmp_path / "2", 2)
    assert all(map(torch.equal, alone, beside))
    assert (len(reads_alone), len(reads)) == (5 * 2 * 2, 3 * 2 * 2)  # batches or groups, steps, layers
    assert steps_alone == [(n, 10) for n in range(1, 11)]
    assert steps == [(2, 10), (4, 10), (6, 10), (8, 10), (9, 10), (10, 10)]
    assert notes == []


def test_batches_run_one_by_one_where_several_have_no_room(tmp_path: Path) -> None:
    backbone, state = model()
    alone = runs_of(Pipe(backbone), state, tmp_path / "1", 1)[0]
    beside, _, _, notes = runs_of(Pipe(backbone, room=1), state, tmp_path / "2", 3)
    assert all(map(torch.equal, alone, beside))
    assert notes == ["the GPU has less room than it had: batches run one by one, and no weight stays there"]


def test_one_batch_without_room_says_what_to_do(tmp_path: Path) -> None:
    backbone, state = model()
    with pytest.raises(DiffcError, match="no room for a calibration step") as error:
        runs_of(Pipe(backbone, room=0), state, tmp_path, 1)
    assert "--batch-size" in (error.value.fix or "")
