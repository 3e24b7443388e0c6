"""A cache plan as squares: the blocks in the graph's order, and the steps in which each is used again."""

from __future__ import annotations

import numpy as np

from diffc.report.schedule import schedule_of

PLAN = {"name": "mine", "groups": [{"blocks": ["b.1", "b.2"], "steps": {"every": 2}, "keep": "residual"}]}


def test_every_second_step_uses_the_blocks_of_the_plan_again() -> None:
    manifest = {"cache": {"plan": PLAN, "layout": "segments"}, "sampling": {"steps": 5}}
    schedule = schedule_of(manifest, ["embed", "b.0", "b.1", "b.2", "out"])
    assert schedule is not None
    assert list(schedule.blocks) == ["embed", "b.0", "b.1", "b.2", "out"]
    again = np.zeros((5, 5), bool)
    again[2:4, [1, 3]] = True
    assert (schedule.reused == again).all()
    assert schedule.computed == 1 - 4 / 25
    assert schedule_of({}, ["b.0"]) is None


def test_blocks_inside_blocks_of_the_graph_stand_in_their_place() -> None:
    plan = {"name": "m", "groups": [{"blocks": ["up.1.attn.0", "x"], "steps": [1], "keep": "output"}]}
    schedule = schedule_of({"cache": {"plan": plan}, "request": {"steps": 2}}, ["down.0", "up.1", "up.2"])
    assert schedule is not None
    assert list(schedule.blocks) == ["down.0", "up.1.attn.0", "up.2", "x"]
    assert schedule.reused.sum(axis=1).tolist() == [0, 1, 0, 1]
