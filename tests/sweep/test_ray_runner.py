"""A sweep on Ray whose worker is killed: every cell once, and the bytes of a compile by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from diffc.artifact.folder import Artifact
from diffc.compile.request import CompileRequest
from diffc.compile.spine import compile_model
from diffc.errors import DiffcError
from diffc.progress import Silent
from diffc.sweep.cells import Axes
from diffc.sweep.job import Job
from diffc.sweep.jobs import Standing
from diffc.sweep.ray_runner import check_ray
from diffc.sweep.request import SweepRequest
from diffc.sweep.rows import DONE, LOST, Row, read_rows
from diffc.sweep.run import sweep
from tests.compile.test_siblings import contents

pytest.importorskip("ray")


MARK = "DIFFC_TEST_OF_A_SWEEP"
"""In the environment of the processes that this test may kill."""


class Killer:
    """A Watcher that kills the first worker of Ray whose process has worked on its cell for a while."""

    def __init__(self, mark: str) -> None:
        self.mark, self.killed = mark, list[int]()

    def known(self, cells: Sequence[Standing | Row], workers: int) -> None:
        assert (len(cells), workers) == (3, 2)

    def begun(self, job: Job) -> None:
        assert job.tasks

    def row(self, row: Row) -> None:
        assert row.status in (DONE, LOST)

    def tick(self) -> None:
        for process in [] if self.killed else psutil.process_iter():
            try:
                working = "diffc.sweep.child" in process.cmdline() and time.time() - process.create_time() > 6
                if working and process.environ().get(MARK) == self.mark:  # not one of another sweep
                    parent = process.parent()
                    assert parent is not None
                    parent.kill()
                    self.killed.append(process.pid)
                    return
            except psutil.Error:
                continue


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:port", "ray://127.0.0.1:1", "[::1]:99999999"])
def test_an_address_where_nothing_answers_is_told_at_once(address: str) -> None:
    with pytest.raises(DiffcError, match="nothing answers at --address"):
        check_ray(address)


@pytest.mark.slow
@pytest.mark.compiles
def test_a_killed_worker_costs_one_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = CompileRequest("", tmp_path, steps=1, calib_size=1, image_size=64, skip_validation=True)
    axes = Axes(["tiny-sd3"], ["none", "int8"], cache_plans=["none", "modelopt-sd3"])
    request = SweepRequest(
        axes, base, tmp_path / "sweep", ("format=none,cache-plan=modelopt-sd3",), workers=2
    )
    monkeypatch.setenv(MARK, str(tmp_path))  # Ray, its workers and their processes have it, too
    killer = Killer(str(tmp_path))
    found = sweep(request, killer)
    assert [row.status for row in found.cells] == [DONE] * 3
    assert killer.killed
    assert not any(psutil.pid_exists(pid) for pid in killer.killed)
    rows = read_rows(request.folder)
    assert sorted(row.cell for row in rows if row.status == DONE) == sorted(row.cell for row in found.cells)
    assert [row.attempt for row in rows if row.status == LOST] == [1]
    (borrowed,) = [row for row in found.cells if row.calibration]
    assert (borrowed.cache_plan, borrowed.calibration) == ("modelopt-sd3", "tiny-sd3-int8")
    again = sweep(request, killer_of_nothing())
    assert len(read_rows(request.folder)) == len(rows)
    assert again.counts["done"] == 3

    single = axes.cells()[3].request(base, tmp_path)
    compile_model(single, Silent())
    swept = request.folder / borrowed.cell
    Artifact.load(swept).verify()
    assert json.loads(contents(swept)["manifest.json"]) == json.loads(
        contents(single.output)["manifest.json"]
    )
    assert contents(swept) == contents(single.output)


def killer_of_nothing() -> Killer:
    killer = Killer("")
    killer.killed = [0]
    killer.known = lambda cells, workers: None  # type: ignore[method-assign]
    return killer
