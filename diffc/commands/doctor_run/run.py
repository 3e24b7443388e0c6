"""Runs every engine and graph of an artifact that this machine can run, compares them, and writes one report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from diffc.artifact.folder import Artifact
from diffc.backends.sm import with_cards
from diffc.backends.target import RUNTIMES
from diffc.commands.doctor_run.cases import Case, Sample, cases, samples
from diffc.commands.doctor_run.child import Ran, run_case
from diffc.commands.doctor_run.machine import machine
from diffc.commands.doctor_run.reference import Held, references
from diffc.commands.doctor_run.report import DIFFERS, NOT_RUN, OK, Examined, Outcome
from diffc.errors import DiffcError, unknown_value
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from passes.files.atomic import write_text


@dataclass(frozen=True)
class DoctorRequest:
    """Which artifact to run, where the report goes, and how.

    `target` None runs everything. `repeat`: runs after the first, whose median is told. `timeout`: seconds for each
    engine or graph.
    """

    artifact: Path
    report: Path
    target: str | None = None
    repeat: int = 5
    timeout: float = 1800.0


def examine_artifact(request: DoctorRequest, ui: Reporter | None = None) -> Examined:
    """Run what can be run, each in a process of its own, and write the report after each, so that none is lost.

    Raises DiffcError for what is no artifact, was changed, or was not compiled for the target.
    """
    ui = ui or default_reporter()
    check_output_file(request.report)
    if request.target is not None and request.target not in RUNTIMES:
        raise unknown_value("runtime target", request.target, RUNTIMES)
    artifact = Artifact.load(request.artifact)
    with ui.stage("hash the files"):
        artifact.verify()
    todo = cases(artifact, request.target)
    if not todo:
        raise DiffcError(
            f"{artifact.folder} has nothing that target {request.target!r} runs",
            fix=f"leave --target out: it was compiled for {', '.join(artifact.manifest['targets'])}",
        )
    with ui.stage("look at the machine"):
        found = Examined(artifact, machine(), ())
    outcomes: list[Outcome] = []
    for outcome in _outcomes(found, todo, request, ui):
        outcomes.append(outcome)
        found = Examined(artifact, found.machine, tuple(outcomes))
        write_text(request.report, json.dumps(found.to_json(), indent=1, default=str) + "\n")
    return found


def _outcomes(
    found: Examined, todo: Sequence[Case], request: DoctorRequest, ui: Reporter
) -> Iterator[Outcome]:
    for case in todo:
        reason = _why_not(found, case)
        if reason:
            yield Outcome(case, NOT_RUN, reason)
            continue
        with ui.stage(f"run {case.file} on {case.target}"):
            taken = samples(found.artifact, case)
            with TemporaryDirectory(prefix="diffc-", ignore_cleanup_errors=True) as work:
                ran = run_case(
                    found.artifact.folder,
                    case,
                    taken,
                    Path(work),
                    gpu=_gpu(found, case),
                    repeat=request.repeat,
                    timeout=request.timeout,
                )
        if ran.status != "done":
            yield Outcome(case, ran.status, ran.reason, ran)
            continue
        with ui.stage(f"compare {case.file} on {case.target}"):
            yield _judged(found.artifact, case, taken, ran)


def _why_not(found: Examined, case: Case) -> str:
    """Why this machine cannot run a case; empty where it is to be tried."""
    if (file := case.file) in found.artifact.missing:
        return f"{file} was left out of this copy"
    gpus = found.machine["gpus"]
    if RUNTIMES[case.target].on_cpu or (gpus and not case.sms):
        return ""
    wanted = " or ".join(map(with_cards, case.sms)) or "an NVIDIA GPU"
    if not gpus:
        return f"this machine has no NVIDIA GPU or driver; it would run on {wanted}"
    here = ", ".join(f"{gpu['name']} (SM{gpu['sm']})" for gpu in gpus)
    return "" if any(gpu["sm"] in case.sms for gpu in gpus) else f"built for {wanted}, and here is {here}"


def _gpu(found: Examined, case: Case) -> int:
    """The number of the first GPU that a case is for."""
    sms = [gpu["sm"] for gpu in found.machine["gpus"]]
    return next((index for index, sm in enumerate(sms) if sm in case.sms), 0)


def _judged(artifact: Artifact, case: Case, taken: Sequence[Sample], ran: Ran) -> Outcome:
    held: list[tuple[str, Sequence[Held]]] = []
    with references(artifact, case, taken) as reference:
        for index, sample in enumerate(taken):
            held.append((sample.label, list(reference.hold(index, sample, ran.outputs[index]))))
        note = reference.why_not
    if not any(all_held for _, all_held in held):
        return Outcome(case, "failed", f"there is nothing to compare with: {note}", ran, held, note)
    wrong = next(filter(None, (_wrong(label, each) for label, all_held in held for each in all_held)), "")
    return Outcome(case, DIFFERS if wrong else OK, wrong, ran, held, note)


def _wrong(label: str, held: Held) -> str:
    """The first output that is beyond its limit, and more than roundings explain; empty without any."""
    if held.passed:
        return ""
    row = next(row for row in held.rows if not row.passed)
    return f"{row.name!r} at {label} against {held.against}: {row.reason}"
