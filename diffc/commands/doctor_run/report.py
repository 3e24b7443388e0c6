"""What came of each case, as a report: for people, and as JSON for whoever gets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from diffc.artifact.folder import Artifact
from diffc.commands.doctor_run.cases import Case
from diffc.commands.doctor_run.child import Ran
from diffc.commands.doctor_run.reference import Held
from diffc.errors import DiffcError, MismatchError

OK, DIFFERS, NOT_RUN = "ok", "differs", "not run"
REPORT_SCHEMA = 1


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
