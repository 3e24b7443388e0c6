"""Kills commands at random moments, runs them again until they end, and holds the result against an undisturbed one.

    python -m tools.prove.kills --kills 100 --seed 1              the five kinds of tools/prove/kill_kinds.py
    python -m tools.prove.kills --kind import --kills 20 --fresh  one kind, every command in a new Python

A chain is one command that is killed one to four times (SIGKILL, SIGTERM or SIGINT), and then runs to its end. After
each kill nothing half-written may stand under a final name. At the end all files must be those of an undisturbed run
(`contents` says what is of the clock), nothing else may lie beside them, and no lock may be held. Prints a line of JSON
for each chain, a table at the end, and exits 1 on any fault.

Commands start as copies of this process, which has run each of them once (Linux): so a moment falls into the work, not
into imports. --fresh starts each anew, as elsewhere.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from diffc.artifact.folder import MANIFEST, Artifact
from diffc.cli.main import run
from diffc.errors import DiffcError
from tools.prove.kill_kinds import KINDS, Kind, contents, write_inputs

SIGNALS = tuple(getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT") if hasattr(signal, name))
MOST_IN_A_ROW = 4
LONGEST = 300.0
"""Seconds after which a command that was not killed is taken to hang."""


def main() -> int:
    """Run the kinds that are asked for; 1 when anything was lost, half or left over."""
    arguments = _arguments()
    kinds = [kind for kind in KINDS if arguments.kind in ("", kind.name)]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="kills-") as name:
        root = Path(name)
        write_inputs(root / "inputs")
        trials = [Trial(kind, root, draw, fresh=arguments.fresh) for kind in kinds]
        ended = time.monotonic() + arguments.seconds
        while sum(t.counts["kills"] for t in trials) < arguments.kills and time.monotonic() < ended:
            min(trials, key=lambda trial: trial.counts["kills"]).chain()
    _print(trials)
    return 1 if any(trial.faults for trial in trials) else 0


class Trial:
    """One kind of command, what it makes undisturbed, and what became of it under kills."""

    def __init__(self, kind: Kind, root: Path, draw: random.Random, *, fresh: bool) -> None:
        self.kind, self._draw, self._fresh = kind, draw, fresh
        self._place, self._temporary = root / kind.name, root / f"{kind.name}-temporary"
        self._inputs = root / "inputs"
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        for folder in (self._place, self._temporary):
            folder.mkdir(exist_ok=True)
        self.expected = self._undisturbed()

    def _undisturbed(self) -> dict[str, str]:
        """The result of an undisturbed run in a process like those that are killed, and how long it takes."""
        if not self._fresh:
            _work(self._command(), self._temporary, self._place.with_suffix(".log"))
            self._clear()
        begin = time.monotonic()
        code = self._end(self._start())
        self.seconds = time.monotonic() - begin
        if code:
            raise SystemExit(f"{self.kind.name}: exit {code} undisturbed:\n{self._said()}")
        return contents(self._place)

    def chain(self) -> None:
        """Kill, run again, and kill again, as drawn; then let it end, and look at all that is there."""
        if self._draw.random() < 0.5:
            self._clear()  # else it replaces the result of the chain before
        line: dict[str, Any] = {"kind": self.kind.name, "kills": []}
        for _ in range(self._draw.randint(1, MOST_IN_A_ROW)):
            moment, number = self._draw.uniform(0, self.seconds), self._draw.choice(SIGNALS)
            hit, code = self._kill(moment, number)
            line["kills"].append([round(moment, 2), number.name, "hit" if hit else "over", code])
            self._look_while_unfinished(line)
            if not hit:
                break
            self.counts["kills"] += 1
            self.counts[number.name] += 1
        code = self._end(self._start())
        self._look_at_the_end(code, line)
        self.counts["chains"] += 1
        print(json.dumps(line), flush=True)

    def _command(self) -> list[str]:
        force = ["--force"] if self.kind.replaces and any(self._place.iterdir()) else []
        return [*self.kind.command(self._inputs, self._place), *force]

    def _start(self) -> Any:
        context: Any = multiprocessing.get_context("spawn" if self._fresh or os.name == "nt" else "fork")
        arguments = (self._command(), self._temporary, self._place.with_suffix(".log"))
        process = context.Process(target=_work, args=arguments)
        process.start()
        return process

    def _kill(self, moment: float, number: signal.Signals) -> tuple[bool, int | None]:
        """Whether it was still at work after `moment` seconds, and its exit code."""
        process = self._start()
        process.join(moment)
        hit = process.exitcode is None
        if hit:
            os.kill(process.pid, number)
        return hit, self._end(process)

    def _end(self, process: Any) -> int | None:
        process.join(LONGEST)
        if process.exitcode is None:
            self._fault(f"it did not end within {LONGEST:.0f} s")
            process.kill()
            process.join()
        code: int | None = process.exitcode
        return code

    def _look_while_unfinished(self, line: dict[str, Any]) -> None:
        """What stands under the final names is nothing, or whole."""
        first = self._place / self.kind.results[0]
        if (first / MANIFEST).is_file() or (first.is_dir() and any(first.iterdir()) and self.kind.replaces):
            try:
                Artifact.load(first).verify()
            except DiffcError as error:
                self._fault(f"half an artifact: {error}", line)
        own = contents(self._place).items()  # beside the final names may be what the next run takes up
        found = {name: text for name, text in own if name.partition("/")[0] in self.kind.results}
        if found and not self._matches(found):
            self._fault(f"half of a result: {_differing(found, self.expected)}", line)

    def _matches(self, found: dict[str, str]) -> bool:
        """Whether each of the names that a result has is whole; one of two files may be there without the other."""
        return all(self.expected.get(name) == text for name, text in found.items())

    def _look_at_the_end(self, code: int | None, line: dict[str, Any]) -> None:
        if code:
            self._fault(f"exit {code} after kills: {self._said()}", line)
        found = contents(self._place)
        if found != self.expected:
            self._fault(f"not as undisturbed: {_differing(found, self.expected)}", line)
        beside = {path.name for path in self._place.iterdir()} - set(self.kind.results)
        if beside:
            self._fault(f"left beside the result: {sorted(beside)}", line)
        left = [path for path in self._temporary.rglob("*") if path.is_file()]
        self.counts["left"] += len(left)
        if left:
            line["left"] = [path.name for path in left][:4]
        _empty(self._temporary)

    def _fault(self, said: str, line: dict[str, Any] | None = None) -> None:
        self.faults.append(said)
        if line is not None:
            line.setdefault("faults", []).append(said)

    def _said(self) -> str:
        return self._place.with_suffix(".log").read_text("utf-8", "replace")[-2000:]

    def _clear(self) -> None:
        _empty(self._place)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _work(command: list[str], temporary: Path, log: Path) -> None:
    """In a process of its own, or once in this: one command, its output in `log`, its temporary files in a folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)
    os.environ["TMPDIR"] = str(temporary)
    shown = sys.stdout, sys.stderr
    try:
        with log.open("w", encoding="utf-8") as file:
            sys.stdout = sys.stderr = file
            code = run(command)
    finally:
        sys.stdout, sys.stderr = shown
        tempfile.tempdir = before
    if code:
        sys.exit(code)


def _differing(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _print(trials: list[Trial]) -> None:
    names = [number.name for number in SIGNALS]
    print("| command | seconds undisturbed | kills | " + " | ".join(names) + " | chains | faults |")
    print("|---" * (len(names) + 5) + "|")
    for trial in trials:
        kills = [str(trial.counts[name]) for name in ("kills", *names, "chains")]
        print(f"| {trial.kind.name} | {trial.seconds:.1f} | {' | '.join(kills)} | {len(trial.faults)} |")
        for fault in trial.faults:
            print(f"{trial.kind.name}: {fault}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", default="", choices=["", *(kind.name for kind in KINDS)])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=86400.0, help="begin no other chain after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to write; the system's temporary folder otherwise")
    parser.add_argument("--fresh", action="store_true", help="start every command anew")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
