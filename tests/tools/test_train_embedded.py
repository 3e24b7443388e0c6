"""A training that has to end in time chooses its number of steps by the time of short ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.train import embedded


@pytest.mark.parametrize(("seconds", "steps"), [(30.0, 3000), (1000.0, 6000), (0.0, 40)])
def test_as_many_steps_as_fit(seconds: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training takes 1 s and 10 ms a step, the first one 10 s more: trials take 15.8 s in all."""
    clock, ran = [0.0], list[int]()

    def train(*given: Any) -> None:
        clock[0] += 1 + 0.01 * given[3] + (0 if ran else 10)
        ran.append(given[3])

    monkeypatch.setattr(embedded, "_train", train)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    found = embedded.affordable("sd15", Path(), torch.device("cpu"), 6000, seconds + 15.8 + 1.4)
    assert found == pytest.approx(steps, abs=1)
