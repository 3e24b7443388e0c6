"""Calls on disk: what was recorded comes back, shared tensors once, rows drawn together."""

from __future__ import annotations

from pathlib import Path

import torch

from diffc.models.registry import FAMILIES
from diffc.train.calls import Calls, Recorder, rows_of
from diffc.train.capture import split
from tests.backbones import BACKBONES

ROWS = frozenset({"x", "time"})


def recorded(folder: Path) -> Calls:
    recorder = Recorder(folder, ROWS)
    text = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for step in range(6):
        x = torch.arange(4.0)[:, None] + 10 * step
        recorder.add({"x": x, "text": text, "time": torch.tensor([0.5 * step])}, (x * 2).to(torch.bfloat16))
    return recorder.finish()


def test_calls_come_back_and_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    made = recorded(tmp_path)
    calls = Calls.load(tmp_path, ROWS)
    assert list(calls.index) == list(made.index)
    assert len(calls) == 6
    first = calls[1]
    assert first.target.dtype == torch.bfloat16
    assert torch.equal(first.inputs["x"], torch.arange(4.0)[:, None] + 10)
    assert torch.equal(first.inputs["time"], torch.full((4,), 0.5))  # one row for all is repeated
    assert len({call["text"] for call in calls.index}) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 6 * 3 + 1


def test_rows_are_drawn_together_from_one_call(tmp_path: Path) -> None:
    calls = recorded(tmp_path)
    for seed in range(20):
        batch = calls.draw(torch.Generator().manual_seed(seed), 3)
        assert batch.inputs["x"].shape == (3, 1)
        assert batch.inputs["text"].shape == (7, 3)
        assert torch.equal(batch.target.float(), batch.inputs["x"] * 2)
        assert len({float(x) // 10 for x in batch.inputs["x"]}) == 1
        assert torch.equal(batch.inputs["time"], batch.inputs["x"][:, 0] // 10 * 0.5)
    assert len(calls.draw(torch.Generator(), 99).target) == 4


def test_judged_calls_are_spread_over_the_recording(tmp_path: Path) -> None:
    calls = recorded(tmp_path)
    begins = [float(batch.inputs["x"][0, 0]) for batch in calls.spread(3)]
    assert begins == [10, 30, 50]
    assert len(list(calls.spread(99))) == 6


def test_rows_of_each_family() -> None:
    found = {name: rows_of(FAMILIES[name], BACKBONES[name][1]) for name in ("sd3", "flux", "sdxl")}
    assert "timestep" in found["sd3"]
    assert "timestep" not in found["sdxl"]
    assert {"img_ids", "txt_ids"}.isdisjoint(found["flux"])


def test_prompts_that_judge_are_not_trained_on() -> None:
    prompts = [f"p{n}" for n in range(10)]
    ours, theirs = split(prompts, 50)
    assert (len(ours), len(theirs)) == (40, 10)
    assert not set(ours) & set(theirs)
    assert set(ours) | set(theirs) == set(prompts)
    assert split(["a"], 1) == (["a"], ["a"])
