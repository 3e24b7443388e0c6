"""diffc cache search: what is measured, and that the plan proposed is the best of those that are fast enough."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffc.cache import CachePlan
from diffc.cache.torch_apply import backbone_of
from diffc.cli.main import run
from diffc.commands.cache_search.measure import SearchRequest, measure
from diffc.commands.cache_search.pipeline import load_for_search
from diffc.commands.cache_search.search import candidates, search
from diffc.errors import DiffcError
from diffc.progress import Silent

PROMPT = ("a handwritten seven",)


def test_shares_and_changes_are_those_of_the_blocks() -> None:
    pipe = load_for_search("digits-sd3", Silent())
    found = measure(pipe, SearchRequest(PROMPT, steps=4))
    assert found.blocks == ("transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2")
    assert 0.7 < found.shares.sum() < 1
    assert found.shares[0] == pytest.approx(found.shares[1])
    assert found.shares[2] < found.shares[1]  # the last has no text to put out
    assert found.changes.shape == (3, 4)
    assert np.isnan(found.changes[:, 0]).all()
    assert ((found.changes[:, 1:] > 1e-3) & (found.changes[:, 1:] < 3)).all()
    few = candidates(found, backbone_of(pipe), 4)
    by_name = {c.plan.name: c for c in few}
    alone, more = by_name["search:0-0,every=2"], by_name["search:0-1,every=2"]
    assert 1 < alone.speedup < more.speedup < 2
    assert alone.predicted < more.predicted < by_name["search:0-1,every=4"].predicted


def test_the_command_writes_a_plan_that_compiles_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    plan, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    options = [
        "--steps",
        "4",
        "--speedup",
        "1.2",
        "--trials",
        "2",
        "--prompt",
        PROMPT[0],
        "--plot",
        str(plot),
    ]
    assert run(["cache", "search", "digits-sd3", "-o", str(plan), *options]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in capsys.readouterr().out
    assert CachePlan.load(plan).to_json() == json.loads(plan.read_text())
    assert run(["cache", "show", "digits-sd3", str(plan), "--steps", "4"]) == 0


def test_the_best_is_the_best_of_those_fast_enough_and_too_much_is_refused() -> None:
    pipe = load_for_search("digits-sd3", Silent())
    found = search(pipe, SearchRequest(PROMPT, steps=4, speedup=1.3, trials=3))
    fast = [c for c in found.tried if c.speedup >= 1.3]
    assert found.best in fast
    assert found.best.psnr == max(c.psnr or 0 for c in fast)
    with pytest.raises(DiffcError, match="no plan makes the backbone 9 times as fast; the most is"):
        search(pipe, SearchRequest(PROMPT, steps=4, speedup=9))
