"""Runs every engine and graph of an artifact that this machine can run, compares them, and writes one report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffc.artifact.folder import Artifact
from diffc.backends.sm import with_cards
from diffc.backends.target import RUNTIMES
from diffc.commands.doctor_run.cases import Case, Sample, cases, samples
from diffc.commands.doctor_run.child import Ran, run_case
from diffc.commands.doctor_run.machine import machine
from diffc.commands.doctor_run.reference import Held, references
from diffc.errors import DiffcError, MismatchError, unknown_value
from diffc.output_files import check_output_file
from diffc.progress import Reporter
from diffc.progress_bar import default_reporter
from passes.files.atomic import write_text

OK, DIFFERS, NOT_RUN = "ok", "differs", "not run"
REPORT_SCHEMA = 1


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


@dataclass(frozen=True)
class Outcome:
    """One case: "ok", "differs", "failed", "crashed", "timed out" or "not run", with the reason and the figures."""

    case: Case
    status: str
    reason: str = ""
    ran: Ran = field(default_factory=lambda: Ran("not run"))
    held: Sequence[tuple[str, Sequence[Held]]] = ()
    note: str = ""

    @property
    def bad(self) -> bool:
        """Whether something is wrong with it."""
        return self.status not in (OK, NOT_RUN)

    def to_json(self) -> dict[str, Any]:
        """The entry of the report."""
        compared = [
            {
                "at": label,
                "against": held.against,
                "passed": held.passed,
                "floor": held.floor,
                "outputs": [asdict(row) for row in held.rows],
            }
            for label, all_held in self.held
            for held in all_held
        ]
        return {
            **asdict(self.case),
            "status": self.status,
            "reason": self.reason,
            "note": self.note,
            "steps": list(self.ran.notes),
            "compared": compared,
            "log": list(self.ran.log) if self.bad else list(self.ran.log)[-20:],
        }


@dataclass(frozen=True)
class Examined:
    """What `examine_artifact` found: every case, and the machine."""

    artifact: Artifact
    machine: Mapping[str, Any]
    outcomes: Sequence[Outcome]

    def require_right(self) -> None:
        """Raise MismatchError (exit code 3) when a case is wrong, DiffcError (1) when none of several engines ran."""
        bad = [outcome for outcome in self.outcomes if outcome.bad]
        if bad:
            first = bad[0]
            raise MismatchError(
                f"{len(bad)} of {len(self.outcomes)} went wrong, the first: {first.case.file} on {first.case.target}"
                f" {first.status}: {first.reason}",
                fix="send the report to whoever made diffc; compile again if you changed a file",
            )
        engines = [outcome for outcome in self.outcomes if outcome.case.is_engine]
        if engines and all(outcome.status == NOT_RUN for outcome in engines):
            raise DiffcError(
                f"none of the {len(engines)} engines could be run: {engines[0].reason}",
                fix="run the same command on a machine with one of these GPUs",
            )

    def to_json(self) -> dict[str, Any]:
        """The report."""
        manifest = self.artifact.manifest
        kept = ("diffc", "versions", "format", "dtype", "targets", "profile", "engines", "opset", "cache")
        named = {key: manifest["model"].get(key) for key in ("name", "family", "fingerprint", "revision")}
        return {
            "text": list(lines(self)),
            "report": REPORT_SCHEMA,
            "machine": dict(self.machine),
            "artifact": {"model": named} | {key: manifest[key] for key in kept if key in manifest},
            "cases": [outcome.to_json() for outcome in self.outcomes],
        }


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
    wrong = next(
        (f"{row.name!r} at {at} against {h.against}: {row.reason}"
         for at, all_held in held for h in all_held if not h.passed for row in h.rows if not row.passed),
        "",
    )  # fmt: skip
    return Outcome(case, DIFFERS if wrong else OK, wrong, ran, held, note)


def lines(found: Examined) -> Iterator[str]:
    """The report for people."""
    manifest, here = found.artifact.manifest, found.machine
    gpus = ", ".join(f"{gpu['name']} (SM{gpu['sm']})" for gpu in here["gpus"]) or "no NVIDIA GPU"
    yield f"{manifest['model']['name']}, {manifest['format']} in {manifest.get('dtype', '')}, diffc {here['diffc']}"
    yield f"{here['system']}; {gpus}; driver {here['driver'] or 'none'}"
    for outcome in found.outcomes:
        yield f"{outcome.status}: {outcome.case.file} on {outcome.case.target}{_times(outcome)}"
        if outcome.reason:
            yield f"  {outcome.reason}"
        for label, all_held in outcome.held:
            for held in all_held:
                worst = max((row.rel_l2 or 0.0 for row in held.rows), default=0.0)
                explained = (
                    "" if all(r.passed for r in held.rows) else f", roundings move it by {held.floor:.1e}"
                )
                limit = held.rows[0].tolerance
                yield f"  {label}: {worst:.1e} from {held.against} (limit {limit:.0e}{explained})"
        if outcome.note:
            yield f"  {outcome.note}"


def _times(outcome: Outcome) -> str:
    notes = outcome.ran.notes
    loaded = next((n["loaded"] for n in notes if "loaded" in n), None)
    runs = [n for n in notes if "first" in n]
    if loaded is None or not runs:
        return ""
    again = "" if runs[0]["median"] is None else f", then {runs[0]['median'] * 1e3:.1f} ms"
    return f": loaded in {loaded:.1f} s, first run {runs[0]['first'] * 1e3:.1f} ms{again}"
