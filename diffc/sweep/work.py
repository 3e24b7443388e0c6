"""What is done with the cells of a job, in a process of their own: a row for each, whatever happens."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.artifact.measured import errors_of, sizes_of
from diffc.compile.plan import check
from diffc.compile.recorded import Recorded
from diffc.compile.request import CompileRequest, code_of_diffc
from diffc.compile.siblings import compile_for_others
from diffc.compile.spine import Made, compile_plan
from diffc.errors import DiffcError
from diffc.memory import peak_rss
from diffc.progress import Logged, stage_of
from diffc.sweep.job import Job, Task
from diffc.sweep.prepare import row_of
from diffc.sweep.rows import DONE, FAILED, Row, Step, now
from diffc.sweep.steps import run_steps
from diffc.sweep.store import SharedCalibrations, Store, fetch_artifact
from diffc.version import VERSION
from passes.base import PassError

LOG = logging.getLogger("diffc.progress")
OWN = ".sweep"
"""Folder, in that of the sweep, of what it needs while it runs."""


def work(job: Job) -> Iterator[Row]:
    """The rows of a job's cells, each as soon as it is finished."""
    with _scratch(job) as scratch:
        shared = _Shared(job, scratch)
        for task in job.tasks:
            started, begun = now(), time.perf_counter()
            found = shared.row(task)
            took = time.perf_counter() - begun
            yield msgspec.structs.replace(
                found,
                started=started,
                seconds=round(took, 3) if found.seconds is None else found.seconds,
                peak_memory=peak_rss(),
                needs=job.needs,
                worker=f"{platform.node()}:{os.getpid()}",
            )


@contextmanager
def _scratch(job: Job) -> Iterator[Path]:
    """Where artifacts are made: the sweep's folder, or with a store a folder of this machine for this job."""
    if not job.artifacts:
        yield job.folder
        return
    with tempfile.TemporaryDirectory(prefix="diffc-sweep-") as folder:
        yield Path(folder)


@dataclass
class _Shared:
    """What the cells of a job have in common: the compile of the first one, as far as it has come."""

    job: Job
    scratch: Path
    made: Made | None = None
    maker: str = ""
    folder: Path | None = None

    def row(self, task: Task) -> Row:
        """Compile a cell, or take its artifact, and do the steps after it; what goes wrong is in the row."""
        values: dict[str, Any] = {"attempt": task.attempt}
        try:
            self._check_machine()
            request = replace(task.request, output=self.scratch / task.cell.name)
            values |= self._artifact(task, request)
        except (DiffcError, PassError) as error:
            return row_of(task.cell, task.dtype, status=FAILED, message=str(error), **values)
        except Exception as error:  # a defect in one cell must not lose the others
            LOG.warning("%s", "".join(traceback.format_exception(error)))
            return row_of(task.cell, task.dtype, status=FAILED, message=_of_others(error), **values)
        return row_of(task.cell, task.dtype, status=DONE, **values)

    def _artifact(self, task: Task, request: CompileRequest) -> dict[str, Any]:
        """Compile, do the steps, upload; the values of the row."""
        store = Store(self.job.artifacts) if self.job.artifacts else None
        begun = time.perf_counter()
        taken = _taken_before(task)
        if not task.there:
            taken = self._compile(task, request) | {"seconds": round(time.perf_counter() - begun, 3)}
        elif store is not None:
            fetch_artifact(store, task.cell.name, request.output)
        artifact = Artifact.load(request.output)
        pictures = self.scratch / "pictures" / task.cell.name
        steps = run_steps(self.job.steps, request, pictures, Logged(), _steps_done(task))
        address = str(request.output)
        if store is not None:
            if not task.there:
                store.put(request.output, task.cell.name, MANIFEST)
            if pictures.is_dir():
                store.put(pictures, f"pictures/{task.cell.name}", "pictures.json")
            address = store.address(task.cell.name)
        return {**taken, **measured(artifact.manifest), "artifact": address, "steps": steps}

    def _compile(self, task: Task, request: CompileRequest) -> dict[str, Any]:
        """Compile a cell; of the first one's compile the others take all but the engines."""
        if self.made is not None and self.folder is not None:
            compile_for_others(self.made, self.folder, request, Logged())
            return {"graph": self.maker, "calibration": self._source(task)}
        shared = SharedCalibrations(Store(self.job.calibrations))
        self.made, _ = compile_plan(check(request), Recorded(Logged()), shared)
        self.maker, self.folder = task.cell.name, request.output
        return {"calibration": self._source(task)}

    def _source(self, task: Task) -> str:
        """The cell that the calibration was taken from; empty for its own."""
        source = self.job.source or self.maker
        return source if self.job.calibration and source != task.cell.name else ""

    def _check_machine(self) -> None:
        """Raise DiffcError when this machine has another diffc than the driver, or does not see its folder."""
        if code_of_diffc() != self.job.code:
            raise DiffcError(
                f"{platform.node()} has another diffc ({VERSION}) than the machine that runs the sweep",
                fix="install the same one on every machine of the cluster",
            )
        if not self.job.artifacts and not (self.job.folder / OWN / self.job.token).is_file():
            raise DiffcError(
                f"{platform.node()} does not see {self.job.folder}",
                fix="name a folder that all machines share, or a store with --artifacts",
            )


def measured(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of a finished artifact."""
    return {"sizes": sizes_of(manifest), "errors": errors_of(manifest)}


def _taken_before(task: Task) -> dict[str, Any]:
    """What the row of an artifact that is there said of its compile."""
    if task.before is None:
        return {}
    return {name: getattr(task.before, name) for name in ("seconds", "calibration", "graph")}


def _steps_done(task: Task) -> dict[str, Step]:
    """The steps that an earlier attempt has done with this artifact."""
    before = task.before.steps if task.there and task.before is not None else {}
    return {name: step for name, step in before.items() if step.status == DONE}


def _of_others(error: Exception) -> str:
    """One message of an error that no part of diffc foresaw."""
    while_ = f"{stage}: " if (stage := stage_of(error)) else ""
    return (
        f"{while_}{type(error).__name__}: {str(error)[:1000]}\n  Fix: diffc compile with the options of this cell"
        " and --debug shows the traceback"
    )
